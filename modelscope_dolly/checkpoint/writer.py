"""Write a checkpoint directory that every reader understands: ours, ModelScope's, transformers' old and new, vLLM's.

The directory is complete or absent: it is filled under a temporary name, its manifest is written last, then it is
renamed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.config import transformers_config
from modelscope_dolly.checkpoint.weights import write_tensors
from modelscope_dolly.engine.settings import MAX_NEW_TOKENS, Sampling
from modelscope_dolly.files import new_directory, read_json, write_atomically, write_json
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer, chat_template

if TYPE_CHECKING:
    import torch
    from transformers import GPTNeoXForCausalLM

    from modelscope_dolly.checkpoint.reader import Checkpoint

SHARD_SIZE = "5GB"
#: ModelScope's key to our pipeline; a copy is in every published revision.
CONFIGURATION = Path(__file__).parents[1] / "configuration.json"
#: Left over in configurations of 2023; they name code that a reader would have to run.
_CODE_KEYS = ("custom_pipelines", "auto_map")


def export_checkpoint(
    model: GPTNeoXForCausalLM,
    tokenizer: DollyTokenizer,
    target: str | Path,
    replace: bool = False,
    state: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Save a trained network and its tokenizer as a complete directory.

    Args:
        model: transformers' network, in the number type to be saved.
        tokenizer: with the three keys.
        target: the new directory.
        replace: allow an existing one to be replaced, at the last moment.
        state: the weights, where those of `model` itself are spread over processes.

    Raises:
        CheckpointError: `target` exists and `replace` is false.
    """
    with new_directory(Path(target), replace) as directory:
        model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD_SIZE)
        tokenizer.tokenizer.save_pretrained(directory)
        write_side_files(directory, tokenizer)
        seal_directory(directory)
    return Path(target)


def export_merged(checkpoint: Checkpoint, dtype: torch.dtype, target: str | Path) -> Path:
    """Save a base model with its adapter merged as a complete directory of plain weights.

    The sums are made in float32 from the weights as they are stored, tensor by tensor: memory for a shard of 1 GiB.

    Args:
        checkpoint: opened with an adapter.
        dtype: number type to save.
        target: the new directory.

    Raises:
        CheckpointError: `target` exists, or the disk does not take it.
    """
    with new_directory(Path(target)) as directory:
        tensors = checkpoint.read_tensors()
        write_tensors(directory, ((name, tensor.to(dtype, copy=True)) for name, tensor in tensors))
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), checkpoint.tokenizer.control.eos)
        transformers_config(checkpoint.config, dtype=dtype, **ids).save_pretrained(directory)
        checkpoint.tokenizer.tokenizer.save_pretrained(directory)
        write_side_files(directory, checkpoint.tokenizer)
        seal_directory(directory)
    return Path(target)


def seal_directory(directory: Path) -> None:
    """Give the weights the permissions of the other files, and record all checksums in a manifest."""
    mode = (directory / "config.json").stat().st_mode
    for shard in directory.glob("*.safetensors"):
        shard.chmod(mode)  # safetensors writes files that only their owner may read
    manifest.write(directory)


def write_side_files(directory: Path, tokenizer: DollyTokenizer) -> None:
    """Turn what save_pretrained wrote, except the weights, into what is published."""
    write_json(directory / "config.json", both_spellings(read_json(directory / "config.json")))
    control = tokenizer.control
    write_json(directory / "generation_config.json", {
        "bos_token_id": control.eos,
        "eos_token_id": [control.end, control.eos],
        "pad_token_id": control.eos,
        "do_sample": Sampling.do_sample,
        "top_p": Sampling.top_p,
        "top_k": Sampling.top_k,
        "max_new_tokens": MAX_NEW_TOKENS,
    })  # fmt: skip
    special = {"additional_special_tokens": list(CONTROL_KEYS)}
    special |= {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad", "unk")}
    write_json(directory / "special_tokens_map.json", special)
    write_json(directory / "tokenizer_config.json", {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    write_atomically(directory / "chat_template.jinja", chat_template())
    shutil.copyfile(CONFIGURATION, directory / CONFIGURATION.name)


def both_spellings(config: dict) -> dict:
    """config.json with the keys of transformers 4 and 5 side by side, the cache on, and no pointer to code."""
    config = {key: value for key, value in config.items() if key not in _CODE_KEYS}
    rope = config.get("rope_parameters") or {}
    config["rotary_pct"] = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    config["rotary_emb_base"] = rope.get("rope_theta", config.get("rotary_emb_base", 10000))
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": config["rotary_emb_base"],
        "partial_rotary_factor": config["rotary_pct"],
    }
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = ["GPTNeoXForCausalLM"]  # not the name of a class that trained it
    config["use_cache"] = True  # training turns it off, and a reader that obeys is ten times slower
    return config
