"""LoRA: train low-rank adapters on all linear layers instead of the weights themselves (arXiv:2106.09685), with peft.

The three keys of dolly are new to the base model, and no adapter reaches an embedding: their rows are trained as well,
in the embedding and in the output matrix. Everything else is frozen. A finished run is merged into plain weights, which
any reader loads without peft; the adapter alone is saved beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelscope_dolly.errors import DollyError, SettingError, unknown_name
from modelscope_dolly.files import new_directory, read_json
from modelscope_dolly.prompt import DollyTokenizer
from train.recipe_file import shown

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import GPTNeoXForCausalLM

    from train.training.loss import CausalLMLoss

#: The linear layers of a GPT-NeoX; "dense" is that of the attention only: names are compared up to a dot.
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
#: What peft writes into a checkpoint beside the adapter's weights.
CONFIG = "adapter_config.json"
#: Directory of the finished adapter, in that of the run.
ADAPTER = "adapter"
_KEYS = ("r", "alpha", "dropout")
#: Far above what is in use, and below what a mistake costs. The widest layer of a dolly has 20,480 outputs.
MOST_RANK, MOST_ALPHA = 16_384, 1e6


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters: W becomes W + alpha / r * B A, with A [r, inputs] and B [outputs, r]."""

    r: int
    alpha: float
    dropout: float


def read_lora(values: dict | None) -> Lora | None:
    """The key `lora` of the configuration, or None.

    Raises:
        SettingError: unknown keys or values out of range, all in one message.
        DollyError: peft is not installed.
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
    if problems:
        raise SettingError("; ".join(problems))
    _peft()
    return Lora(rank, float(alpha), float(dropout))


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise DollyError("lora needs the package peft, which is not installed: pip install peft") from None
    return peft


def check_lora(lora: Lora | None, stage: int, resume: Path | None) -> None:
    """Refuse settings that cannot be combined with the adapters, before the model is loaded.

    Args:
        lora: from read_lora.
        stage: ZeRO stage of this run.
        resume: checkpoint to resume from.

    Raises:
        SettingError: ZeRO 3, or a checkpoint of other adapters, or of none, or of adapters where there are none now.
    """
    if lora and stage == 3:
        # peft 0.21 collects the rows of the keys from split weights over CUDA only, and little is left to split.
        raise SettingError("lora does not work with ZeRO 3, which splits the frozen weights: give zero_stage 0, 1 or 2")
    if resume is None:
        return
    saved = read_json(resume / CONFIG) if (resume / CONFIG).is_file() else None
    before = "none" if saved is None else f"{{r: {saved.get('r')}, alpha: {saved.get('lora_alpha')}}}"
    now = "none" if lora is None else f"{{r: {lora.r}, alpha: {lora.alpha}}}"
    if before != now:
        raise SettingError(
            f"{resume} was saved with lora {before} and this run has {now}: give the same, or another output_dir"
        )


def adapter_config(lora: Lora, tokenizer: DollyTokenizer) -> LoraConfig:
    """peft's configuration."""
    control = tokenizer.control
    rows = sorted((control.end, control.instruction, control.response))
    return _peft().LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(LINEARS),
        trainable_token_indices={"embed_in": rows, "lm_head": rows},
    )


def add_adapters(model: CausalLMLoss, lora: Lora, tokenizer: DollyTokenizer) -> PeftModel:
    """Freeze the network of `model`, in its number type, and add float32 adapters, which are zero at first.

    Around CausalLMLoss and not inside it: the Trainer recognises a PeftModel and saves and loads the adapters alone.
    """
    model.base_model_prefix = "network"  # where peft, seeing transformers' configuration, looks for the rest
    # By default peft keeps what it trains in float32: in bfloat16 most updates would be rounded away.
    return _peft().get_peft_model(model, adapter_config(lora, tokenizer))


def merge(trained: PeftModel, lora: Lora, tokenizer: DollyTokenizer, base: str, adapter: Path) -> GPTNeoXForCausalLM:
    """Save the adapter alone, as one of the plain network, and return that network with the adapter merged in.

    Args:
        trained: from add_adapters; it is modified.
        lora, tokenizer: as for add_adapters.
        base: name of the base model, for the adapter's configuration.
        adapter: the new directory, for PeftModel.from_pretrained.
    """
    peft = _peft()
    # Names of the trained model go through CausalLMLoss, those of the saved adapter must not.
    weights = {
        name.replace("base_model.model.network.", "base_model.model.", 1): tensor.detach().float().cpu()
        for name, tensor in peft.get_peft_model_state_dict(trained, save_embedding_layers=False).items()
    }
    network = trained.unload().network
    network.name_or_path = base  # peft takes it from there
    plain = peft.get_peft_model(network, adapter_config(lora, tokenizer))
    peft.set_peft_model_state_dict(plain, weights)
    with new_directory(adapter, replace=True) as growing:
        plain.save_pretrained(str(growing), save_embedding_layers=False)
        (growing / "README.md").unlink(missing_ok=True)  # an empty template
    return plain.merge_and_unload()
