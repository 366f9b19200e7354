"""The processes of a run, as the launcher describes them in the environment (torchrun, deepspeed, accelerate)."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from modelscope_dolly.errors import DollyError


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    return rank() == 0


def print_first(*lines: object) -> None:
    """Print lines in the first process only."""
    if is_first_process():
        print(*lines, sep="\n", end="\n" if lines else "")


def launch_alone() -> None:
    """Set what a launcher would have set for one process: without it DeepSpeed looks for MPI."""
    if "RANK" in os.environ:
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def gather(part: dict[str, str]) -> dict[str, str]:
    """The parts of all processes together."""
    if world_size() == 1:
        return part
    parts: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(parts, part)
    return {name: value for one in parts for name, value in one.items()}


def check_agreement(chosen: tuple[Any, ...]) -> None:
    """Raise DollyError unless all processes chose alike: they read free memory at slightly different times."""
    if world_size() == 1:
        return
    everywhere: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(everywhere, chosen)
    if len(set(everywhere)) > 1:
        raise DollyError(
            f"the processes chose different settings, {sorted(set(everywhere))}; set zero_stage, offload, dtype and "
            "checkpoint_activations"
        )
