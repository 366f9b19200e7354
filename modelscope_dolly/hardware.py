"""Device, number type, threads and memory. Each choice has a reason, which is logged, and can be overridden."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelscope_dolly.errors import HardwareError, SettingError, is_whole, shown, unknown_name
from modelscope_dolly.files import gigabytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPE_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}

#: First compute capability whose tensor cores multiply bfloat16 (Ampere); Turing and Volta only emulate it.
_BF16_CAPABILITY = (8, 0)

#: As many threads are allowed on any machine. The OpenMP library keeps a table of them on the stack, of 8 MiB.
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Choice:
    """A value and the reason for it."""

    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


_DEVICES = ("cpu", "cuda", "cuda:N", "gpu")


def choose_device(requested: str | torch.device | None = None) -> Choice:
    """Turn `cpu`, `cuda`, `cuda:N`, `gpu` or `gpu:N` into a torch.device.

    `gpu` is what ModelScope passes when the user names no device: the first CUDA device, else the CPU. A device that is
    named with its number must exist; ModelScope alone would silently run on the CPU.

    Raises:
        HardwareError: the named device is not on this machine, or not supported.
        SettingError: no such kind of device.
    """
    if requested is not None and not isinstance(requested, (str, torch.device)):
        raise SettingError(unknown_name("device", requested, _DEVICES))
    name = str(requested or "gpu").lower()
    if re.fullmatch(r"mps(:[0-9]+)?", name):
        raise HardwareError(f"device {name!r} was asked for, but Apple GPUs are not supported; use device='cpu'")
    match = re.fullmatch(r"(cpu|cuda|gpu)(?::([0-9]{1,9}))?", name)
    if match is None:
        raise SettingError(unknown_name("device", name, _DEVICES))
    kind, number = match[1], match[2]
    if kind == "cpu":
        return Choice(torch.device("cpu"), "asked for")
    count = torch.cuda.device_count()
    if kind == "gpu" and number is None and count == 0:
        return Choice(torch.device("cpu"), "no CUDA device here")
    index = int(number or 0)
    if index >= count:
        present = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
        built = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        raise HardwareError(
            f"device {name!r} was asked for, but this machine shows {present}{built}; "
            f"use device='{'cpu' if count == 0 else 'cuda:0'}'"
        )
    return Choice(torch.device("cuda", index), "first CUDA device" if kind == "gpu" and number is None else "asked for")


def parse_dtype(requested: str | torch.dtype) -> torch.dtype:
    """`bf16`, `bfloat16`, `torch.bfloat16`, ... -> torch.dtype. Raises SettingError."""
    name = dtype_name(requested).lower() if isinstance(requested, (str, torch.dtype)) else ""
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        asked = str(requested) if isinstance(requested, torch.dtype) else requested
        raise SettingError(unknown_name("dtype", asked, ("auto", *DTYPES)))
    return DTYPES[name]


def dtype_name(dtype: torch.dtype | str) -> str:
    """`bfloat16` for torch.bfloat16, as config.json spells it."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(
    device: torch.device, requested: str | torch.dtype | None = None, float32: float = 0.0, how: str = ""
) -> Choice:
    """Number type of the weights on `device`.

    A CPU computes in float32, so that an answer does not depend on the instructions that it has.

    Args:
        device: where the weights will be.
        requested: overrides the choice; None or "auto" leaves it to this function.
        float32: bytes that the weights take for arithmetic in float32; on a CPU it is only chosen where they fit.
        how: added to the reason for float32.

    Raises:
        SettingError: `requested` is no number type.
    """
    if requested is not None and not (isinstance(requested, str) and requested == "auto"):
        return Choice(parse_dtype(requested), "asked for")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        if capability >= _BF16_CAPABILITY:
            return Choice(torch.bfloat16, f"{name} computes it")
        return Choice(torch.float16, f"{name} (compute capability {capability[0]}.{capability[1]}) has no bfloat16")
    if float32 > 0.8 * (free := free_memory()):
        return Choice(torch.bfloat16, f"float32 needs {gigabytes(float32)}, {gigabytes(free)} of memory are free")
    return Choice(torch.float32, f"exact{how}")


def cpu_computes_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware: AVX512-BF16, AMX, or Arm's bf16 extension."""
    flags = {"avx512_bf16", "amx_bf16", "bf16"}
    if hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.11
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(flag, False) for flag in flags)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not flags.isdisjoint(cpuinfo.read_text().split())


def choose_threads(requested: int | None = None) -> Choice:
    """How many threads compute on the CPU: as many as torch would start, but no more than this process has cores.

    torch counts the machine's cores; a container or a pinned process may use fewer, and two threads on one core wait
    for each other at every layer. A lower number set by the user (torch.set_num_threads, OMP_NUM_THREADS) stays.

    Raises:
        SettingError: `requested` is not a whole number of at least 1, or more than can be started.
    """
    if requested is not None:
        most = max(_MOST_THREADS, os.cpu_count() or 1)
        if not is_whole(requested, 1, most):
            raise SettingError(f"threads is {shown(requested)}, it must be a whole number from 1 to {most}")
        count = int(requested)
        if (started := _threads_that_start(count)) < count:
            raise SettingError(
                f"threads is {count}, but this process may start only {started} more (ulimit -u, or the container's "
                f"limit of processes); this machine has {available_cores()} cores for it"
            )
        return Choice(count, "asked for")
    now, cores = torch.get_num_threads(), available_cores()
    return Choice(cores, "physical cores for this process") if cores < now else Choice(now, "as torch has it")


def _threads_that_start(count: int) -> int:
    """How many of `count` threads can be started: where one cannot, the OpenMP library ends the process."""
    end = threading.Event()
    threads = []
    try:
        while len(threads) < count:
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:  # can't start new thread
        pass
    finally:
        end.set()
        for thread in threads:
            thread.join()
    return len(threads)


def release_threads() -> None:
    """End the OpenMP threads that wait for the calling thread's next loop, which starts them again in about 0.1 ms.

    Each thread that computes has a team of its own. Once there are more of them than cores, GNU's runtime lets idle
    ones sleep instead of spin, and every loop of the one that computes begins with waking them up.
    """
    if (pause := _omp_pause()) is not None:
        pause(_OMP_PAUSE_SOFT)


#: omp_pause_soft of OpenMP 5.0, section 3.2.44.
_OMP_PAUSE_SOFT = 1


@functools.cache
def _omp_pause() -> Callable[[int], int] | None:
    """omp_pause_resource_all of GNU's runtime, if that is what torch computes with."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY).omp_pause_resource_all
    except (OSError, AttributeError):  # another system, another runtime, or one before OpenMP 5.0
        return None


def available_cores() -> int:
    """Physical cores that this process may use: its CPU affinity, and the control group's share where there is one."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(tuple((topology / name).read_text() for name in ("physical_package_id", "core_id")))
        except OSError:  # not Linux, or hidden: each CPU counts as a core
            cores.add(cpu)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        share = math.ceil(int(quota) / int(period)) if quota != "max" else len(cores)
    except (OSError, ValueError):
        share = len(cores)
    return max(1, min(len(cores), share))


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that can be allocated on `device` (default: the CPU, within the control group's limit if there is one)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    limit = _cgroup_limit()
    return min(free, limit) if limit is not None else free


def _cgroup_limit() -> int | None:
    """Bytes left under a container's memory limit (cgroup v2), which psutil does not know about."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        return max(0, int(limit) - used) if limit.isdigit() else None
    except (OSError, ValueError):
        return None
