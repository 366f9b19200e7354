"""The machine that a run is planned for: this one, or one described by text such as `8xA100-80G,host=512G`.

Memory is in GiB (2^30 bytes) here, like the names of the cards and the figures of nvidia-smi and torch; disk is in GB.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from modelscope_dolly.errors import SettingError, unknown_name
from modelscope_dolly.files import free_disk
from modelscope_dolly.hardware import choose_dtype, free_memory
from train.distributed import world_size
from train.planning.memory import GIB
from train.recipe_file import shown

#: name -> (computes bfloat16, keeps error-correction bits in its memory). GDDR6 cards of data centers give 1/16 of
#: their memory to those bits (an A10 of 24 GiB reports 22.5); HBM has its own, and an RTX 4090 has them switched off.
CARDS = {
    "A10-24G": (True, True),
    "A100-40G": (True, False),
    "A100-80G": (True, False),
    "H100-80G": (True, False),
    "H200-141G": (True, False),
    "L4-24G": (True, True),
    "L40S-48G": (True, True),
    "RTX4090-24G": (True, False),
    "T4-16G": (False, True),
    "V100-16G": (False, False),
    "V100-32G": (False, False),
}
#: How the names of cards older than Ampere begin, for cards that are not listed.
_OLD = ("GTX", "K80", "M40", "P100", "P40", "RTX20", "T4", "TITAN", "V100")
#: GiB of a card that a job cannot use: driver, CUDA context, NCCL. Only for cards that are described by name.
RESERVE = 1.5


def gib(count: float | None) -> str:
    """Bytes as GiB (2^30), the unit of GPU memory; one digit."""
    return "not stated" if count is None else f"{count / GIB:.1f} GiB"


@dataclass(frozen=True)
class Hardware:
    """One machine, or several alike. Sizes are bytes that are free; None: not stated, and assumed to be enough."""

    name: str
    gpus: int
    gpu_memory: int
    host_memory: int | None
    disk: int | None
    computes_bf16: bool
    processes: int = 1  # of a run on CPUs, which share the memory of the host

    @property
    def ranks(self) -> int:
        """Processes that share the model states."""
        return self.gpus or self.processes

    @property
    def cpu_only(self) -> bool:
        return self.gpus == 0

    @classmethod
    def here(cls, output_dir: str | Path) -> Hardware:
        """The machine of this process; of several GPUs the one with the least free memory counts."""
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return cls(
            name=torch.cuda.get_device_name(devices[0]) if devices else "CPU",
            gpus=len(devices),
            gpu_memory=min(map(free_memory, devices), default=0),
            host_memory=free_memory(),
            disk=free_disk(output_dir),
            computes_bf16=bool(devices) and all(choose_dtype(device).value == torch.bfloat16 for device in devices),
        )

    @classmethod
    def of_this_run(cls, output_dir: str | Path) -> Hardware:
        """What this process sees of the machines of all processes that were launched with it.

        Of several processes each looks at its own GPU only, because a look opens a context on it, and at the total
        memory instead of what is free just now, because all processes must come to the same choice.
        """
        world = world_size()
        if world == 1:
            return cls.here(output_dir)
        local_rank, local_world = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        host = free_memory() * max(1, world // (local_world or world))
        if not torch.cuda.is_available():
            return cls("CPU", 0, 0, host, free_disk(output_dir), False, world)
        device = torch.device("cuda", local_rank)
        usable = torch.cuda.get_device_properties(device).total_memory - int(RESERVE * GIB)
        computes_bf16 = choose_dtype(device).value == torch.bfloat16
        return cls(torch.cuda.get_device_name(device), world, usable, host, free_disk(output_dir), computes_bf16)

    @classmethod
    def parse(cls, text: str) -> Hardware:
        """A machine described by text: `8xA100-80G`, `4xNAME-24G,host=512G,disk=2T`, `cpu,host=64G`.

        G is 2^30 bytes, T is 2^40; `host` and `disk` are what is free.

        Raises:
            SettingError: unknown card, or something that cannot be read.
        """
        first, *rest = text.upper().replace(" ", "").split(",")
        sizes = {"HOST": None, "DISK": None}
        for part in rest:
            match = re.fullmatch(r"(HOST|DISK)=([0-9]{1,7})([GT])", part)
            if match is None:
                raise SettingError(f"hardware {shown(text)}: {shown(part.lower())} must look like host=512G or disk=2T")
            sizes[match[1]] = int(match[2]) * GIB * (1024 if match[3] == "T" else 1)
        if first == "CPU":
            return cls("CPU", 0, 0, sizes["HOST"], sizes["DISK"], False)
        count, name = re.fullmatch(r"(?:([0-9]{1,5})X)?(.*)", first).groups()
        # Not a count that the line above did not take: too many digits, or digits of another script.
        nominal = re.fullmatch(r"(?![0-9]+X)[A-Z0-9][A-Z0-9._-]{0,39}-([0-9]{1,6})G", name)
        if nominal is None or int(nominal[1]) <= 2 * RESERVE or (count and int(count) == 0):
            raise SettingError(
                f"hardware {shown(text)}: {unknown_name('GPU', name[:80], (*CARDS, 'NxNAME-NNG', 'cpu'))}"
            )
        computes_bf16, corrects = CARDS.get(name, (not name.startswith(_OLD), True))
        usable = int(nominal[1]) * (15 / 16 if corrects else 1) - RESERVE
        return cls(name, int(count or 1), int(usable * GIB), sizes["HOST"], sizes["DISK"], computes_bf16)

    def __str__(self) -> str:
        """As `parse` reads it, if it knows the name."""
        options = (("host", self.host_memory), ("disk", self.disk))
        stated = "".join(f",{key}={size // GIB}G" for key, size in options if size is not None)
        return ("cpu" if self.cpu_only else f"{self.gpus}x{self.name}") + stated
