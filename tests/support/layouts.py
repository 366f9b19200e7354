"""Checkpoint directories as other programs write them, and damaged ones, all made from one exported directory."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.load import load_network
from modelscope_dolly.prompt import CONTROL_KEYS

#: Keys of config.json that transformers 4 of 2023 did not know.
_NEW_KEYS = ("rope_parameters", "dtype", "attention_bias", "is_decoder", "pad_token_id", "transformers_version")
#: What a repository of 2023 ran on the machine of whoever loaded it; here, running it fails the test.
TRAP = "raise RuntimeError('code of a checkpoint directory was run')\n"


def read_state(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory with one safetensors file, under their names on disk."""
    return load_file(directory / "model.safetensors")


def edit_json(path: Path, drop: tuple[str, ...] = (), **changes) -> None:
    """Change and remove keys of a JSON object in a file."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value[key] for key in value if key not in drop}, indent=2), encoding="utf-8")


def copy_2023_layout(source_dir: Path, target_dir: Path, keys: str = "absent", positions: int = 64) -> Path:
    """A replica of an upload of 2023: a pickle with buffers, a configuration in the old spelling, code beside it.

    Args:
        source_dir: an exported directory with one safetensors file.
        target_dir: the new directory.
        keys: in tokenizer.json the three keys are "absent", "plain" (not marked as special) or "special".
        positions: side of the causal masks among the buffers; 2048 in the originals.
    """
    target_dir.mkdir(parents=True)
    config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    state = read_state(source_dir)
    width = int(config["hidden_size"] // config["num_attention_heads"] * config["rotary_pct"])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{layer}.attention"
        state[f"{prefix}.bias"] = torch.ones(1, 1, positions, positions, dtype=torch.bool).tril()
        state[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        exponents = torch.arange(0, width, 2).float() / width
        state[f"{prefix}.rotary_emb.inv_freq"] = 1.0 / (config["rotary_emb_base"] ** exponents)
    torch.save(state, target_dir / "pytorch_model.bin")

    old = {key: value for key, value in config.items() if key not in _NEW_KEYS}
    old |= {"torch_dtype": config["dtype"], "use_cache": False, "transformers_version": "4.25.1"}
    old["custom_pipelines"] = {"text-generation": {"impl": "instruct_pipeline.InstructionTextGenerationPipeline"}}
    _write_json(target_dir / "config.json", old)
    _write_json(
        target_dir / "configuration.json",
        {
            "framework": "pytorch",
            "task": "text-generation",
            "allow_remote": True,
            "pipeline": {"type": "dolly-v2-2023-pipe"},
        },
    )
    tokenizer = json.loads((source_dir / "tokenizer.json").read_text(encoding="utf-8"))
    added = tokenizer["added_tokens"]
    if keys == "absent":
        tokenizer["added_tokens"] = [token for token in added if token["content"] not in CONTROL_KEYS]
    elif keys == "plain":
        tokenizer["added_tokens"] = [token | {"special": token["content"] not in CONTROL_KEYS} for token in added]
    _write_json(target_dir / "tokenizer.json", tokenizer)
    special = json.loads((source_dir / "special_tokens_map.json").read_text(encoding="utf-8"))
    _write_json(target_dir / "special_tokens_map.json", special)
    for name in ("ms_wrapper.py", "instruct_pipeline.py"):
        (target_dir / name).write_text(TRAP, encoding="utf-8")
    return target_dir


def shard(source_dir: Path, target_dir: Path, shards: int = 3) -> Path:
    """The same directory with its tensors dealt out to several safetensors files; with a manifest if it had one."""
    shutil.copytree(source_dir, target_dir)
    state = read_state(target_dir)
    (target_dir / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: state[name] for name in part}, target_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in state.values())
    _write_json(
        target_dir / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
    )
    if (source_dir / manifest.NAME).exists():
        manifest.write(target_dir)
    return target_dir


def plain_hf(source_dir: Path, target_dir: Path) -> Path:
    """The same directory as transformers would have written it, without ModelScope's file and without a manifest."""
    shutil.copytree(source_dir, target_dir, ignore=shutil.ignore_patterns("configuration.json", manifest.NAME))
    return target_dir


def replace_state(directory: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write other tensors into a directory without a manifest."""
    assert not (directory / manifest.NAME).exists()
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> GPTNeoX:
    """The engine's network with the weights of a directory, on the CPU."""
    return load_network(open_checkpoint(directory), dtype, {"": "cpu"})


def refusal(directory: Path, *parts: str) -> str:
    """The message with which a directory is refused; it must have `parts` and the command that repairs it."""
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    message = str(caught.value)
    for part in (*parts, "modelscope download --model "):
        assert part in message, f"{part!r} is not in: {message}"
    assert message.count("modelscope download") == 1 and "\n" not in message
    return message


def assert_same_network(net: GPTNeoX, oracle: GPTNeoXForCausalLM, prompt: list[int], tokens: int = 12) -> None:
    """Equal logits and equal greedy tokens as transformers' own network, which here runs without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            expected = oracle(input_ids=torch.tensor([ids])).logits[0, -1].float()
            step = StepInput.prefill([len(ids)])
            found = net(torch.tensor(ids), step, KVCache(1, len(ids)))[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            ids.append(int(expected.argmax()))
    request = Request(prompt, tokens, Sampling(do_sample=False))
    [answer] = Engine(net, torch.device("cpu"), net.config.max_position_embeddings).generate([request])
    assert answer == ids[len(prompt) :]


DAMAGES = ("truncate", "flip a bit of", "delete", "swap", "empty", "break the JSON of", "append to")


def damage(directory: Path, rng: random.Random) -> str:
    """Do one random harm to one file of a directory; says what it did."""
    names = sorted(path.name for path in directory.iterdir())
    name, kind = rng.choice(names), rng.choice(DAMAGES)
    path = directory / name
    data = bytearray(path.read_bytes())
    if kind == "truncate":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flip a bit of":
        # Half of them near the beginning or the end, where file formats keep what they know about themselves.
        near = rng.choice(
            (rng.randrange(4096), -1 - rng.randrange(4096), rng.randrange(1 << 40), rng.randrange(1 << 40))
        )
        data[near % len(data)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = directory / rng.choice([other for other in names if other != name])
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"{kind} {name} and {other.name}"
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "break the JSON of":
        path = directory / rng.choice([name for name in names if name.endswith(".json")])
        text = path.read_text(encoding="utf-8", errors="replace")
        marks = [at for at, mark in enumerate(text) if mark in '{}[]:,"'] or [0]
        at = rng.choice(marks)
        path.write_text(text[:at] + rng.choice(("", "null", "}", '"', "-1", "[[")) + text[at + 1 :], encoding="utf-8")
        return f"{kind} {path.name}"
    else:
        path.write_bytes(data + rng.randbytes(rng.randrange(1, 4096)))
    return f"{kind} {name}"
