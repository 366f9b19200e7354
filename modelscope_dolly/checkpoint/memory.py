"""How much memory a dolly-v2 takes, by arithmetic: nothing is downloaded or loaded to find out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelscope_dolly.checkpoint.manifest import read_json
from modelscope_dolly.checkpoint.reader import locate_config, read_config
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.hardware import cpu_computes_bf16, dtype_name, free_disk, free_memory, gigabytes
from modelscope_dolly.kernels import cpu as kernels
from modelscope_dolly.kernels.quantized_linear import BYTES_PER_WEIGHT, METHODS, is_linear

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

#: hidden size, layers, heads of the published sizes (config.json of databricks/dolly-v2-3b, -7b, -12b).
SHAPES = {"3b": (2560, 32, 32), "7b": (4096, 32, 32), "12b": (5120, 36, 40)}
VOCABULARY = 50280

#: Format -> bytes of a number that is no linear weight, and how linear weights are kept (see bytes_per_weight).
FORMATS = {"fp32": (4, None), "fp32/bf16": (4, "bf16"), "bf16": (2, None), "int8": (2, "int8"), "int4": (2, "int4")}
#: Weights stored in bf16, multiplied in float32 by the compiled kernels: only the CPU has it.
HELD = "fp32/bf16"


@dataclass(frozen=True)
class Need:
    """Bytes of one model in one format: the weights, and the key/value cache of one answer of the whole window."""

    format: str
    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def shape_config(size: str) -> GPTNeoXConfig:
    """Configuration of a published size."""
    from transformers import GPTNeoXConfig

    hidden, layers, heads = SHAPES[size]
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=2048,
    )


def bytes_per_weight(name: str, shape: Sequence[int], itemsize: int, method: str | None) -> float:
    """Bytes in memory of each number of a parameter.

    Args:
        name, shape: of the parameter.
        itemsize: bytes of the number type of the network.
        method: how its linear layers are kept: "int8", "int4", "bf16" (packed for our kernels), or None (torch's own).
    """
    return BYTES_PER_WEIGHT[method] if method and is_linear(name, shape) else itemsize


def weight_bytes(config: GPTNeoXConfig, itemsize: int, method: str | None = None) -> int:
    """Bytes of all parameters in memory; for the arguments see bytes_per_weight."""
    shapes = parameter_shapes(config).items()
    return math.ceil(sum(math.prod(s) * bytes_per_weight(name, s, itemsize, method) for name, s in shapes))


def needs(config: GPTNeoXConfig) -> list[Need]:
    """One row per format. What is not quantised is in the number type that this CPU computes."""
    positions = 2 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    rows = []
    for name, (itemsize, method) in FORMATS.items():
        if name in METHODS and not cpu_computes_bf16():
            itemsize = 4
        rows.append(Need(name, weight_bytes(config, itemsize, method), positions * itemsize))
    return rows


def places() -> dict[str, int]:
    """Memory that can be had here: name of the device -> free bytes."""
    found = {"cpu": free_memory()}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = free_memory(torch.device("cuda", index))
    return found


def model_config(model: str, revision: str | None = None) -> tuple[GPTNeoXConfig, bool]:
    """Of a size name (3b, 7b, 12b), a directory, or a hub id, of which only config.json is fetched.

    Also whether that says that the weights are stored in bfloat16, as those of the published sizes are.
    """
    if model in SHAPES:
        return shape_config(model), True
    path = locate_config(model, revision)
    raw = read_json(path / "config.json")
    return read_config(path), dtype_name(str(raw.get("dtype") or raw.get("torch_dtype"))) == "bfloat16"


def plan(model: str, revision: str | None = None) -> dict:
    """All figures as a JSON-ready dictionary; sizes in bytes. Raises CheckpointError when the model is unknown."""
    from modelscope.hub.utils.utils import get_cache_dir

    config, in_bf16 = model_config(model, revision)
    held = in_bf16 and kernels.level() > 0
    rows = [row for row in needs(config) if held or row.format != HELD]
    free = places()
    cache_dir = Path(get_cache_dir())
    download = next(row.weights for row in rows if row.format == "bf16")
    return {
        "model": model,
        "parameters": sum(math.prod(shape) for shape in parameter_shapes(config).values()),
        "window": config.max_position_embeddings,
        "formats": [
            {
                "format": row.format,
                "weights": row.weights,
                "cache_per_answer": row.cache,
                "fits": [
                    name for name, size in free.items() if row.total <= size and (name == "cpu" or row.format != HELD)
                ],
            }
            for row in rows
        ],
        "free_memory": free,
        "download": download,
        "cache_dir": str(cache_dir),
        "free_disk": free_disk(cache_dir),
    }


def report(figures: dict) -> str:
    """The figures for people."""
    window = figures["window"]
    lines = [
        f"{figures['model']}: {figures['parameters'] / 1e9:.3f} billion weights, window {window} tokens",
        "",
        f"{'format':<10}{'weights':>12}{'cache':>12}{'together':>12}   fits on",
    ]
    for row in figures["formats"]:
        fits = ", ".join(row["fits"]) or "nothing here"
        weights, cache = row["weights"], row["cache_per_answer"]
        sizes = "".join(f"{gigabytes(size):>12}" for size in (weights, cache, weights + cache))
        lines.append(f"{row['format']:<10}{sizes}   {fits}")
    disk = "enough" if figures["download"] <= figures["free_disk"] else "NOT enough"
    lines.append("")
    if any(row["format"] == HELD for row in figures["formats"]):
        lines.append(f"{HELD}: what fp32 takes on this CPU: linear weights stay in bf16 as stored, float32 computes")
    lines += [
        f"cache: keys and values of one answer at the full window of {window} tokens; a batch of 8 takes 8 of them",
        "free memory: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in figures["free_memory"].items()),
        f"download: about {gigabytes(figures['download'])} in bf16 or fp16; {gigabytes(figures['free_disk'])} free in "
        f"{figures['cache_dir']}: {disk}",
    ]
    return "\n".join(lines)
