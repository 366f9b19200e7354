"""`dolly plan`: memory and disk that a model needs, compared with this machine. Nothing is loaded to find out."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from modelscope_dolly.cli.options import add_json, add_revision
from modelscope_dolly.files import free_disk, gigabytes

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig

SUMMARY = "memory and disk a model needs, compared with what is here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="3b, 7b, 12b, a directory, or a hub id (only its config.json is downloaded)")
    add_revision(parser)
    add_json(parser, ", sizes in bytes")


def run(options: argparse.Namespace) -> int:
    figures = plan_figures(options.model, options.revision)
    print(json.dumps(figures, indent=2) if options.json else format_plan(figures))
    return 0


def plan_figures(model: str, revision: str | None = None) -> dict:
    """All figures as a JSON-ready dictionary; sizes in bytes. Raises CheckpointError when the model is unknown."""
    from modelscope_dolly.checkpoint.download import cache_directory
    from modelscope_dolly.checkpoint.memory import FP32_OVER_BF16, memory_needs
    from modelscope_dolly.engine.gpt_neox import parameter_shapes
    from modelscope_dolly.kernels import cpu as kernels

    config, stored_in_bf16 = model_config(model, revision)
    offered = stored_in_bf16 and kernels.level() > 0
    rows = [row for row in memory_needs(config) if offered or row.format != FP32_OVER_BF16]
    free = free_memory_by_device()

    def fits(row, device: str) -> bool:
        return row.total <= free[device] and (device == "cpu" or row.format != FP32_OVER_BF16)

    return {
        "model": model,
        "parameters": sum(math.prod(shape) for shape in parameter_shapes(config).values()),
        "window": config.max_position_embeddings,
        "formats": [
            {
                "format": row.format,
                "weights": row.weights,
                "cache_per_answer": row.cache,
                "fits": [device for device in free if fits(row, device)],
            }
            for row in rows
        ],
        "free_memory": free,
        "download": next(row.weights for row in rows if row.format == "bf16"),
        "cache_dir": str(cache_directory()),
        "free_disk": free_disk(cache_directory()),
    }


def model_config(model: str, revision: str | None = None) -> tuple[NetworkConfig, bool]:
    """Configuration of a size name (3b, 7b, 12b), a directory, or a hub id, of which only config.json is downloaded.

    Also whether the weights are stored in bfloat16 according to it, as those of the published sizes are.
    """
    from modelscope_dolly.checkpoint.config import read_config
    from modelscope_dolly.checkpoint.download import locate_config
    from modelscope_dolly.checkpoint.memory import SHAPES, shape_config
    from modelscope_dolly.files import read_json
    from modelscope_dolly.hardware import dtype_name

    if model in SHAPES:
        return shape_config(model), True
    path = locate_config(model, revision)
    raw = read_json(path / "config.json")
    return read_config(path), dtype_name(str(raw.get("dtype") or raw.get("torch_dtype"))) == "bfloat16"


def free_memory_by_device() -> dict[str, int]:
    """Name of each device of this machine -> bytes that can be allocated on it."""
    import torch

    from modelscope_dolly.hardware import free_memory

    gpus = {f"cuda:{index}": torch.device("cuda", index) for index in range(torch.cuda.device_count())}
    return {"cpu": free_memory()} | {name: free_memory(device) for name, device in gpus.items()}


def format_plan(figures: dict) -> str:
    """The figures for people."""
    window = figures["window"]
    lines = [
        f"{figures['model']}: {figures['parameters'] / 1e9:.3f} billion weights, window {window} tokens",
        "",
        f"{'format':<10}{'weights':>12}{'cache':>12}{'together':>12}   fits on",
    ]
    for row in figures["formats"]:
        devices = ", ".join(row["fits"]) or "nothing here"
        weights, cache = row["weights"], row["cache_per_answer"]
        sizes = "".join(f"{gigabytes(size):>12}" for size in (weights, cache, weights + cache))
        lines.append(f"{row['format']:<10}{sizes}   {devices}")
    lines.append("")
    if any(row["format"] == "fp32/bf16" for row in figures["formats"]):
        lines.append("fp32/bf16: what fp32 takes on this CPU: linear weights stay in bf16 as stored, float32 computes")
    disk = "enough" if figures["download"] <= figures["free_disk"] else "NOT enough"
    lines += [
        f"cache: keys and values of one answer at the full window of {window} tokens; a batch of 8 takes 8 of them",
        "free memory: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in figures["free_memory"].items()),
        f"download: about {gigabytes(figures['download'])} in bf16 or fp16; {gigabytes(figures['free_disk'])} free in "
        f"{figures['cache_dir']}: {disk}",
    ]
    return "\n".join(lines)
