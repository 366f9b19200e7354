"""How much memory a dolly-v2 takes, by arithmetic: nothing is downloaded or loaded to find out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint import locate_config, read_config
from .hardware import free_disk, free_memory, gigabytes
from .neox import parameter_shapes
from .quantize import BYTES_PER_WEIGHT, is_linear

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

#: hidden size, layers, heads of the published sizes (config.json of databricks/dolly-v2-3b, -7b, -12b).
SHAPES = {"3b": (2560, 32, 32), "7b": (4096, 32, 32), "12b": (5120, 36, 40)}
VOCABULARY = 50280

#: Bytes per weight of a linear layer.
FORMATS = {"fp32": 4.0, "bf16": 2.0, "int8": BYTES_PER_WEIGHT["int8"], "int4": BYTES_PER_WEIGHT["int4"]}
#: Formats that only the CPU computes in this version.
CPU_ONLY = ("int8", "int4")


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


def needs(config: GPTNeoXConfig) -> list[Need]:
    """One row per format. Embeddings and norms stay in bf16 when the linear layers are quantised."""
    shapes = parameter_shapes(config)
    linear = sum(math.prod(s) for name, s in shapes.items() if is_linear(name, s))
    other = sum(math.prod(s) for s in shapes.values()) - linear
    positions = 2 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    rows = []
    for name, width in FORMATS.items():
        rest = max(width, 2.0)
        rows.append(Need(name, math.ceil(linear * width + other * rest), math.ceil(positions * rest)))
    return rows


def places() -> dict[str, int]:
    """Memory that can be had here: name of the device -> free bytes."""
    found = {"cpu": free_memory()}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = free_memory(torch.device("cuda", index))
    return found


def model_config(model: str, revision: str | None = None) -> GPTNeoXConfig:
    """Of a size name (3b, 7b, 12b), a directory, or a hub id, of which only config.json is fetched."""
    return shape_config(model) if model in SHAPES else read_config(locate_config(model, revision))


def plan(model: str, revision: str | None = None) -> dict:
    """All figures as a JSON-ready dictionary; sizes in bytes. Raises CheckpointError when the model is unknown."""
    from modelscope.hub.utils.utils import get_cache_dir

    config = model_config(model, revision)
    rows = needs(config)
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
                    name
                    for name, size in free.items()
                    if row.total <= size and (name == "cpu" or row.format not in CPU_ONLY)
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
        f"{'format':<8}{'weights':>12}{'cache':>12}{'together':>12}   fits on",
    ]
    for row in figures["formats"]:
        fits = ", ".join(row["fits"]) or "nothing here"
        weights, cache = row["weights"], row["cache_per_answer"]
        sizes = "".join(f"{gigabytes(size):>12}" for size in (weights, cache, weights + cache))
        lines.append(f"{row['format']:<8}{sizes}   {fits}")
    disk = "enough" if figures["download"] <= figures["free_disk"] else "NOT enough"
    lines += [
        "",
        f"cache: keys and values of one answer at the full window of {window} tokens; a batch of 8 takes 8 of them",
        "free memory: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in figures["free_memory"].items()),
        f"download: about {gigabytes(figures['download'])} in bf16 or fp16; {gigabytes(figures['free_disk'])} free in "
        f"{figures['cache_dir']}: {disk}",
    ]
    return "\n".join(lines)
