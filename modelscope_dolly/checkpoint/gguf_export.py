"""A checkpoint directory as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) read.

The file holds the weights, the tokenizer, the chat template, both ids that end an answer, and where all of it comes
from. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of keys and tensors are those of the
package gguf, which llama.cpp's authors publish.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.download import snapshot_name
from modelscope_dolly.checkpoint.gguf_vocabulary import PRE_TOKENIZER, GGUFVocabulary, gguf_vocabulary
from modelscope_dolly.checkpoint.reader import Checkpoint, open_checkpoint
from modelscope_dolly.checkpoint.weights import read_tensors, weight_files
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.engine.settings import Sampling
from modelscope_dolly.errors import CheckpointError, HardwareError, SettingError, one_line, unknown_name
from modelscope_dolly.files import check_disk, new_file
from modelscope_dolly.prompt import chat_template

if TYPE_CHECKING:
    import gguf
    import numpy as np

#: Name of each number type that matrices can have in the file -> the largest value it holds. The scales of q8_0, one
#: for 32 numbers, are float16. Vectors (biases, layer norms) are always float32: llama.cpp's own files have them so.
LARGEST = {
    "f32": torch.finfo(torch.float32).max,
    "f16": torch.finfo(torch.float16).max,
    "bf16": torch.finfo(torch.bfloat16).max,
    "q8_0": 127 * torch.finfo(torch.float16).max,
}
#: The published weights of dolly-v2 are bfloat16, so nothing is lost.
DEFAULT_TYPE = "bf16"
#: Our own key: what `manifest.model_digest` says of the source directory.
DIGEST_KEY = "dolly.source_sha256"
#: Activations for which llama.cpp's GELU stands in; whatever config.json says, it computes that for GPT-NeoX.
_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh")


def check_request(target: str | Path, type_name: str) -> None:
    """Raises DollyError for what can be known to be wrong before a model is downloaded or read."""
    if type_name not in LARGEST:
        raise SettingError(unknown_name("type", type_name, LARGEST))
    target = Path(target)
    if target.suffix != ".gguf":
        raise SettingError(f"{target}: the name of the new file must end in .gguf, for instance {target.name}.gguf")
    if target.exists():
        raise CheckpointError(f"{target}: exists already; give another name or remove it")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SettingError(
            "dolly export needs the package gguf, which is not installed: pip install 'modelscope-dolly[gguf]'"
        ) from None


def export_gguf(source: str | Path, target: str | Path, type_name: str = DEFAULT_TYPE) -> Path:
    """Write the directory `source` as the new file `target`, which is complete or absent; takes memory for two tensors.

    Args:
        source: a checkpoint directory.
        target: the new file, whose name ends in .gguf.
        type_name: f32, f16, bf16 or q8_0, of the matrices.

    Raises:
        SettingError: unknown type, wrong name of the file, the package gguf is missing, or `source` is quantised.
        CheckpointError: `source` is damaged, llama.cpp would compute something else from it, or `target` exists.
        HardwareError: the disk is too small, or the file cannot be written.
    """
    check_request(target, type_name)
    target = Path(target)
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization:
        raise SettingError(
            f"{source}: is quantised to {checkpoint.quantization}, and GGUF has other formats for that: its numbers "
            "would be rounded twice; give the directory that it was made from"
        )
    _check_network(checkpoint, type_name)
    vocabulary = gguf_vocabulary(checkpoint.tokenizer, checkpoint.config.vocab_size)
    shapes = _shapes(checkpoint)
    size = sum(_stored_bytes(shape, type_name) for shape in shapes.values()) + vocabulary.size
    check_disk(target, size, "the GGUF file")
    card = _read_card(checkpoint.path)
    weights = weight_files(checkpoint.path)
    digest = manifest.model_digest(checkpoint.path, weights, verified={file.name for file in weights})
    try:
        with new_file(target) as path:
            _write(path, checkpoint, shapes, type_name, vocabulary, card, digest)
    except OSError as error:
        raise HardwareError(f"{target}: cannot be written: {error.strerror or one_line(error)}") from None
    return target


def _check_network(checkpoint: Checkpoint, type_name: str) -> None:
    config, file = checkpoint.config, checkpoint.path / "config.json"
    if config.hidden_act not in _GELU:
        raise CheckpointError(
            f"{file}: hidden_act is {config.hidden_act!r}, llama.cpp computes gelu for every GPT-NeoX"
        )
    for name in ("hidden_size", "intermediate_size"):
        if type_name == "q8_0" and getattr(config, name) % 32:
            raise CheckpointError(
                f"{file}: {name} is {getattr(config, name)}, q8_0 needs a multiple of 32; give --type f16 or bf16"
            )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the file, in its order; llama.cpp wants all biases, and a head of its own."""
    config = copy.deepcopy(checkpoint.config)
    config.attention_bias, config.tie_word_embeddings = True, False
    shapes = parameter_shapes(config)
    stored = sorted(checkpoint.tensors, key=lambda name: checkpoint.tensors[name][0])  # file by file, as they are read
    return {name: shapes[name] for name in (*stored, *(name for name in shapes if name not in checkpoint.tensors))}


def _tensors(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `_shapes` in its order: the stored ones, then the head of tied embeddings and missing biases."""
    yield from read_tensors({name: checkpoint.tensors[name] for name in shapes if name in checkpoint.tensors})
    for name, shape in shapes.items():
        if name == "embed_out.weight" and name not in checkpoint.tensors:
            [(_, tied)] = read_tensors({name: checkpoint.tensors["gpt_neox.embed_in.weight"]})
            yield name, tied
        elif name not in checkpoint.tensors:
            yield name, torch.zeros(shape)


def split_qkv(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """query_key_value [H * 3 * D, ...], head by head as transformers has it -> [3 * H * D, ...], all queries first."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _read_card(path: Path) -> dict:
    """The YAML head of README.md; empty where there is none."""
    from gguf import Metadata

    try:
        return Metadata.load_model_card(path)
    except Exception as error:  # of the YAML library, of the file system, or of the decoding
        raise CheckpointError(f"{path / 'README.md'}: its YAML head cannot be read ({one_line(error)})") from None


def _write(
    path: Path,
    checkpoint: Checkpoint,
    shapes: dict[str, tuple[int, ...]],
    type_name: str,
    vocabulary: GGUFVocabulary,
    card: dict,
    digest: str,
) -> None:
    import gguf
    import numpy as np

    config = checkpoint.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPTNEOX])
    try:
        _add_provenance(writer, checkpoint.path, card, digest)
        _add_network(writer, checkpoint, type_name)
        _add_tokenizer(writer, checkpoint, vocabulary)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPTNEOX, config.num_hidden_layers)
        for name, shape in shapes.items():
            writer.add_tensor_info(
                names.get_name(name, try_suffixes=(".weight", ".bias")),
                shape,
                np.float32,  # the shape counts numbers, not bytes; they are stored as raw_dtype says
                _stored_bytes(shape, type_name),
                raw_dtype=_stored_type(shape, type_name),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        tensors = _tensors(checkpoint, shapes)
        for name, tensor in tqdm(tensors, total=len(shapes), unit="tensors", desc="Writing", disable=None, leave=False):
            _check_values(checkpoint, name, tensor, type_name)
            if ".query_key_value." in name:
                tensor = split_qkv(tensor, config.num_attention_heads)
            writer.write_tensor_data(_encode(tensor, _stored_type(tensor.shape, type_name)))
    finally:
        writer.close()


def _add_provenance(writer: gguf.GGUFWriter, path: Path, card: dict, digest: str) -> None:
    writer.add_type("model")
    name, revision = snapshot_name(path) or (path.resolve().name, "")
    writer.add_name(name)
    writer.add_version(revision)
    writer.add_license(", ".join(_texts(card.get("license"))))
    bases = _texts(card.get("base_model"))
    if bases:
        writer.add_base_model_count(len(bases))
    for number, base in enumerate(bases):
        writer.add_base_model_name(number, base)
    writer.add_string(DIGEST_KEY, digest)


def _texts(value: object) -> list[str]:
    """A text, or the texts of a list; whatever else a card may say is no text."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text]


def _add_network(writer: gguf.GGUFWriter, checkpoint: Checkpoint, type_name: str) -> None:
    import gguf

    config = checkpoint.config
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(
        int(config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"])
    )
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    stored = "ALL_F32" if type_name == "f32" else f"MOSTLY_{type_name.upper()}"
    writer.add_file_type(gguf.LlamaFileType[stored])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint, vocabulary: GGUFVocabulary) -> None:
    control = checkpoint.tokenizer.control
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(control.eos)
    writer.add_eos_token_id(control.eos)
    writer.add_pad_token_id(control.eos)
    writer.add_eot_token_id(control.end)  # without it an answer would run past its end key
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template())
    writer.add_sampling_temp(Sampling.temperature)
    writer.add_sampling_top_k(Sampling.top_k)
    writer.add_sampling_top_p(Sampling.top_p)
    writer.add_sampling_min_p(0.0)  # llama.cpp has a default of its own


def _stored_type(shape: tuple[int, ...], type_name: str) -> gguf.GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType["F32" if len(shape) == 1 else type_name.upper()]


def _stored_bytes(shape: tuple[int, ...], type_name: str) -> int:
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[_stored_type(shape, type_name)]
    return math.prod(shape) // numbers * size


def _check_values(checkpoint: Checkpoint, name: str, tensor: torch.Tensor, type_name: str) -> None:
    largest = max(abs(value.item()) for value in torch.aminmax(tensor))
    limit = LARGEST["f32" if tensor.dim() == 1 else type_name]
    if not math.isfinite(largest):
        raise CheckpointError(f"{checkpoint.path}: {name} holds values that are not finite; run: dolly check")
    if largest > limit:
        raise CheckpointError(
            f"{checkpoint.path}: {name} holds values up to {largest:.6g}, {type_name} ends at {limit:.6g}; "
            f"give another --type of {', '.join(LARGEST)}"
        )


def _encode(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The numbers as they are in the file, as an array of whatever type has the same bytes."""
    import gguf

    types = gguf.GGMLQuantizationType
    if kind == types.F16:
        return tensor.half().contiguous().numpy()
    if kind == types.BF16:  # numpy has no bfloat16
        return tensor.bfloat16().contiguous().view(torch.int16).numpy()
    numbers = tensor.float().contiguous().numpy()
    return numbers if kind == types.F32 else gguf.quantize(numbers, kind)
