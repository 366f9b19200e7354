"""LoRA: train low-rank adapters on linear layers instead of the weights themselves (arXiv:2106.09685), with peft.

The three keys of dolly are new to the base model, and no adapter reaches an embedding: their rows are trained as well,
in the embedding and in the output matrix. Everything else is frozen, and with `bits` quantised by bitsandbytes: QLoRA
(arXiv:2305.14314). A finished run is merged into plain weights, which any reader loads without peft: the base's, as
they are stored, plus the adapter. The adapter alone is saved beside them.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.adapter import CONFIG, LINEARS, MOST_ALPHA, MOST_RANK, WEIGHTS, write_base
from modelscope_dolly.checkpoint.weights import weight_files
from modelscope_dolly.errors import DollyError, SettingError, unknown_name
from modelscope_dolly.files import new_directory, read_json
from modelscope_dolly.prompt import CONTROL_KEYS, DollyTokenizer
from train.recipe_file import shown

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig, GPTNeoXConfig

    from train.training.loss import CausalLMLoss

#: Directory of the finished adapter, in that of the run.
ADAPTER = "adapter"
#: Bits of a frozen weight of a linear layer.
BITS = (4, 8)
_ABSENT = object()
_KEYS = ("r", "alpha", "dropout", "targets", "bits")


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters: W becomes W + alpha / r * B A, with A [r, inputs] and B [outputs, r].

    Attributes:
        targets: the linear layers of each block that get one.
        bits: of the frozen weights of the linear layers while they are trained on; None: the run's number type.
    """

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] = LINEARS
    bits: int | None = None


def read_lora(values: dict | None) -> Lora | None:
    """The key `lora` of the configuration, or None.

    Raises:
        SettingError: unknown keys or values out of range, all in one message.
        DollyError: peft is not installed, or with `bits` bitsandbytes.
    """
    if values is None:
        return None
    problems = [unknown_name("lora setting", str(name), _KEYS) for name in values if name not in _KEYS]
    rank = values.get("r")
    if not _is_number(rank, int) or not 1 <= rank <= MOST_RANK:
        problems.append(
            f"lora.r is {shown(rank)}, it must be a whole number of at least 1 and at most {MOST_RANK:,}, for instance "
            "lora: {r: 16}"
        )
        rank = 1
    alpha, dropout = values.get("alpha", 2 * rank), values.get("dropout", 0.0)
    if not _is_number(alpha, (int, float)) or not 0 < alpha <= MOST_ALPHA:
        problems.append(f"lora.alpha is {shown(alpha)}, it must be a number above 0 and at most {MOST_ALPHA:,.0f}")
    if not _is_number(dropout, (int, float)) or not 0 <= dropout < 1:
        problems.append(f"lora.dropout is {shown(dropout)}, it must be in [0, 1)")
    targets, bits = values.get("targets", list(LINEARS)), values.get("bits")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        problems.append(f"lora.targets is {shown(targets)}, it must be a list with some of {', '.join(LINEARS)}")
        targets = []
    problems += [unknown_name("layer in lora.targets", name, LINEARS) for name in targets if name not in LINEARS]
    if bits is not None and (not _is_number(bits, int) or bits not in BITS):
        problems.append(f"lora.bits is {shown(bits)}, it must be 4 or 8, or left out")
    if problems:
        raise SettingError("; ".join(problems))
    _peft()
    if bits is not None:
        _need("bitsandbytes", "lora with bits")
    return Lora(rank, float(alpha), float(dropout), tuple(name for name in LINEARS if name in targets), bits)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _peft() -> Any:
    _need("peft", "lora")
    # peft imports bitsandbytes where that is installed, which on a CPU fetches compiled code from a hub if it finds the
    # package `kernels`. It can do without, and warns about that.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kernels = sys.modules.get("kernels", _ABSENT)
    sys.modules["kernels"] = None
    try:
        import peft
    finally:
        del sys.modules["kernels"]
        if kernels is not _ABSENT:
            sys.modules["kernels"] = kernels
    return peft


def _need(package: str, what: str) -> None:
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # an entry of sys.modules without a specification
        found = None
    if found is None:
        raise DollyError(f"{what} needs the package {package}, which is not installed: pip install {package}")


def check_base(model: str, network: GPTNeoXConfig, vocabulary: int) -> None:
    """Refuse a base that adapters cannot be trained on and merged into.

    Args:
        model: its name.
        network: its own configuration.
        vocabulary: tokens that it is trained with.

    Raises:
        SettingError: embeddings that are tied, or missing for other tokens than the keys of dolly.
    """
    if network.tie_word_embeddings:
        raise SettingError(f"lora: {model} ties its embeddings, and the rows of the keys are trained in both apart")
    if network.vocab_size < vocabulary - len(CONTROL_KEYS):
        raise SettingError(
            f"lora: {model} has embeddings of {network.vocab_size} of {vocabulary} tokens, and adapters train only "
            "those of the keys: train all weights, without lora"
        )


def check_resume(lora: Lora | None, resume: Path | None) -> None:
    """Raises SettingError for a checkpoint of other adapters, or of none, or of adapters where there are none now."""
    if resume is None:
        return
    saved = read_json(resume / CONFIG) if (resume / CONFIG).is_file() else None
    before = "none" if saved is None else f"{{r: {saved.get('r')}, alpha: {saved.get('lora_alpha')}}}"
    now = "none" if lora is None else f"{{r: {lora.r}, alpha: {lora.alpha}}}"
    if before != now:
        raise SettingError(
            f"{resume} was saved with lora {before} and this run has {now}: give the same, or another output_dir"
        )


def quantization(lora: Lora | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the frozen linear layers are quantised while they are loaded; None: not at all.

    4 bits: NormalFloat with doubly quantised scales, multiplied in `dtype` (arXiv:2305.14314). 8 bits: LLM.int8(),
    whose inputs with outliers stay in `dtype` (arXiv:2208.07339). Embedding, output matrix, norms and biases stay as
    they are.
    """
    if lora is None or lora.bits is None:
        return None
    from transformers import BitsAndBytesConfig

    kept = ["lm_head", "embed_out"]
    if lora.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )  # fmt: skip


def keep_quantised_weights(model: torch.nn.Module) -> None:
    """Keep the 4-bit weights of a network as they were loaded.

    bitsandbytes repacks them for AVX-512 at the first evaluation on a CPU, with scales rounded to bfloat16: the steps
    after it would train on other weights, and other processors on others again. Nor can it repack narrow layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def adapter_config(lora: Lora, tokenizer: DollyTokenizer) -> LoraConfig:
    """peft's configuration."""
    control = tokenizer.control
    rows = sorted((control.end, control.instruction, control.response))
    return _peft().LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        trainable_token_indices={"embed_in": rows, "lm_head": rows},
    )


def add_adapters(model: CausalLMLoss, lora: Lora, tokenizer: DollyTokenizer) -> PeftModel:
    """Freeze the network of `model`, in its number type, and add float32 adapters, which are zero at first.

    Around CausalLMLoss and not inside it: the Trainer recognises a PeftModel and saves and loads the adapters alone.
    """
    model.base_model_prefix = "network"  # where peft, seeing transformers' configuration, looks for the rest
    # By default peft keeps what it trains in float32: in bfloat16 most updates would be rounded away.
    return _peft().get_peft_model(model, adapter_config(lora, tokenizer))


def save_adapter(
    trained: PeftModel, name: str, base: Path, target: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Save the adapter alone, in float32, as one of the plain network, with a record of its base.

    Args:
        trained: from add_adapters.
        name: of the base model.
        base: its directory.
        target: the new directory, for PeftModel.from_pretrained, and for `adapter=` and `--adapter`.
        state: weights to save instead of those of `trained`, under the same names.
    """
    from safetensors.torch import save_file

    state = state or _peft().get_peft_model_state_dict(trained, save_embedding_layers=False)
    # Names of the trained model go through CausalLMLoss, those of the saved adapter must not.
    weights = {
        key.replace("base_model.model.network.", "base_model.model.", 1): tensor.detach().float().cpu().contiguous()
        for key, tensor in state.items()
    }
    config = trained.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = name, True
    digest = manifest.weights_digest(base, weight_files(base))
    with new_directory(target, replace=True) as growing:
        save_file(weights, growing / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(growing))
        write_base(growing, name, digest)
        (growing / WEIGHTS).chmod((growing / CONFIG).stat().st_mode)  # safetensors lets only the owner read
        manifest.write(growing)
