"""Write a checkpoint directory that every reader understands: ours, ModelScope's, transformers' old and new, vLLM's.

A directory is complete or absent: it grows under another name, its manifest is written last, and a rename makes it
visible.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.manifest import read_json
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer, chat_template

if TYPE_CHECKING:
    import torch
    from transformers import GPTNeoXForCausalLM

SHARD_SIZE = "5GB"
#: ModelScope's key to our pipeline; the template of every published revision.
CONFIGURATION = Path(__file__).parents[1] / "configuration.json"
#: Left over in configurations of 2023; they name code that a reader would have to run.
_CODE_KEYS = ("custom_pipelines", "auto_map")


@contextmanager
def new_directory(target: Path, replace: bool = False) -> Iterator[Path]:
    """A directory to fill, beside `target`, that becomes `target` when the block ends well and vanishes otherwise.

    Raises:
        CheckpointError: `target` exists and `replace` is false, or it is not a directory.
    """
    target = Path(target).resolve()  # through a link: what it points to is replaced, on that file system
    _check_free(target, replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id alone: in a container it is often the same one again, and a killed process leaves its names.
    mark = f"{os.getpid()}.{secrets.token_hex(4)}"
    growing, old = (target.with_name(f".{target.name}.{mark}.{state}") for state in ("incomplete", "old"))
    growing.mkdir()
    try:
        yield growing
        _check_free(target, replace)  # another writer may have been faster
        if target.exists():
            target.rename(old)
        growing.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def _check_free(target: Path, replace: bool) -> None:
    if target.exists() and not (replace and target.is_dir()):
        raise CheckpointError(f"{target}: exists already; give another directory or remove this one")


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
    """
    with new_directory(Path(target), replace) as directory:
        model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD_SIZE)
        tokenizer.tokenizer.save_pretrained(directory)
        write_side_files(directory, tokenizer)
        seal_directory(directory)
    return Path(target)


def seal_directory(directory: Path) -> None:
    """Make the weights as readable as the rest, and vouch for all files with a manifest."""
    mode = (directory / "config.json").stat().st_mode
    for shard in directory.glob("*.safetensors"):
        shard.chmod(mode)  # safetensors writes files that only their owner may read
    manifest.write(directory)


def write_side_files(directory: Path, tokenizer: DollyTokenizer) -> None:
    """Turn what save_pretrained wrote, the weights apart, into what is published."""
    _write_json(directory / "config.json", both_spellings(read_json(directory / "config.json")))
    control = tokenizer.control
    generation = {
        "bos_token_id": control.eos,
        "eos_token_id": [control.end, control.eos],
        "pad_token_id": control.eos,
        "do_sample": True,
        "top_p": 0.92,
        "top_k": 0,
        "max_new_tokens": 256,
    }
    _write_json(directory / "generation_config.json", generation)
    special = {"additional_special_tokens": list(CONTROL_KEYS)}
    special |= {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad", "unk")}
    _write_json(directory / "special_tokens_map.json", special)
    _write_json(directory / "tokenizer_config.json", {**special, "tokenizer_class": "PreTrainedTokenizerFast",
                                                      "model_max_length": 2048, "padding_side": "left",
                                                      "clean_up_tokenization_spaces": False})  # fmt: skip
    manifest.write_atomically(directory / "chat_template.jinja", chat_template())
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
    config["use_cache"] = True  # training turns it off, and a reader that believes it is ten times slower
    return config


def _write_json(path: Path, value: dict) -> None:
    manifest.write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
