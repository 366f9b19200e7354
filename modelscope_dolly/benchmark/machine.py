"""Description of the machine that a benchmark ran on: hardware and versions."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("modelscope-dolly", "torch", "transformers", "safetensors", "modelscope", "triton")
#: Instruction sets that decide which kernels run.
_INSTRUCTIONS = [
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
]


def describe_machine(device: torch.device, threads: int) -> dict:
    """JSON-ready; sizes in bytes."""
    on_gpu = device.type == "cuda"
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    flags = {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()}
    return {
        **({"gpu": _describe_gpu(device)} if on_gpu else {}),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "kind": device.type,
        "instructions": sorted(flags & set(_INSTRUCTIONS)),
        "threads": threads,
        "cpus": os.cpu_count(),
        "last_cache_bytes": last_cache(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def _describe_gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}", "l2_cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda, "driver": _driver(),
    }  # fmt: skip


def _driver() -> str | None:
    """Version of the GPU driver; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def last_cache() -> int:
    """Bytes of the largest cache of the first CPU; 0 where the system does not tell."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()
