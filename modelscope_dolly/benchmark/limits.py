"""What this machine can do at best, measured, and what a figure is worth beside it.

At batch 1 every weight of a linear layer is read once per token, so that a token cannot take less than the bytes of the
weights divided by the rate at which memory is read. In prefill and large batches the limit is the matrix product.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch.nn import functional as F

from modelscope_dolly.benchmark import peers
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.hardware import DTYPES, free_memory
from modelscope_dolly.kernels.quantized_linear import BYTES_PER_WEIGHT

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

#: Least bytes of the array that is read, where the size of the last cache is unknown.
_LEAST_ARRAY = 1 << 30
#: Repeats further apart than this, relative to their median, were disturbed, whatever by.
LARGEST_SPREAD = 0.15
#: So were those beside which other processes kept this many CPUs busy.
LARGEST_LOAD = 0.15
_VERSIONS = ("modelscope-dolly", "torch", "transformers", "safetensors", "modelscope", "triton")
#: Width of the matrices that are read.
_WIDTH = 4096
#: Calls between two looks at the clock on a GPU, which is told to begin them all before it ends the first.
_CALLS = 20


def run_limits(job: dict) -> dict:
    """In the child: bandwidth in bytes/s, and operations/s of torch's matrix product in each of the job's types."""
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    peers.say("bandwidth")
    found: dict = {"bandwidth": read_bandwidth(device), "matrix": {}}
    for name in job["limits"]:
        peers.say(f"matrix product in {name}")
        found["matrix"][name] = matrix_peak(device, DTYPES[name])
    return found


def read_bandwidth(device: torch.device, repeats: int = 5, array: int | None = None) -> dict:
    """Bytes per second at which memory is read: the median of `repeats` after a warm-up, and the others beside it.

    On a CPU: a float32 matrix-vector product with all threads, whose time is that of reading the matrix, over an array
    of more than four times the last cache, on huge pages where the system gives them. On CUDA: see gpu_bandwidth.
    """
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        least = min(array or max(_LEAST_ARRAY, 4 * cache), free_memory(device) // 2)
        return gpu_bandwidth(device, [least, min(4 * least, free_memory(device) // 2)], repeats)
    size = array or max(_LEAST_ARRAY, 4 * last_cache() + (64 << 20))
    size -= size % (4 * _WIDTH)
    matrix = torch.frombuffer(_huge(size), dtype=torch.float32).fill_(1.0).view(-1, _WIDTH)
    vector = torch.ones(_WIDTH)
    return _rate(lambda: torch.mv(matrix, vector), size, repeats, device)


def gpu_bandwidth(device: torch.device, sizes: list[int], repeats: int) -> dict:
    """Bytes per second at which memory of a GPU is read: the best of two ways and several sizes.

    None of them alone is a limit that an engine could not exceed: which kernel reads fastest depends on the card.

    Returns:
        spread() of the best one; `how` and `array_bytes`; `copy`, that of the best copy from memory to memory, bytes
        read plus bytes written, which is what is commonly quoted; `tried`, the median of each.
    """
    tried = [one for size in sizes for one in _ways(device, size - size % (8 * _WIDTH), repeats)]
    best = {copy: max((one for one in tried if (one["how"] == "copy") == copy), key=lambda one: one["max"])
            for copy in (False, True)}  # fmt: skip
    medians = {f"{one['how']}, {one['array_bytes']} bytes": one["median"] for one in tried}
    return {**best[False], "copy": best[True], "tried": medians}


def _ways(device: torch.device, size: int, repeats: int) -> list[dict]:
    matrix, vector = torch.ones(size // 4 // _WIDTH, _WIDTH, device=device), torch.ones(_WIDTH, device=device)
    first, second = matrix.chunk(2)
    ways: dict[str, Callable[[], object]] = {
        "matrix-vector product": lambda: torch.mv(matrix, vector),
        "sum": matrix.sum,
        "copy": lambda: second.copy_(first),
    }
    return [{**_rate(work, size, repeats, device), "how": how, "array_bytes": size} for how, work in ways.items()]


def _huge(size: int) -> mmap.mmap:
    """Anonymous memory, on huge pages if the system has them: fewer page-table walks, about a tenth more bandwidth."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without them
            pass
    return memory


def last_cache() -> int:
    """Bytes of the largest cache of the first CPU; 0 where the system does not tell."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)


def matrix_peak(device: torch.device, dtype: torch.dtype, repeats: int = 3, size: int | None = None) -> dict:
    """Operations per second of torch's own matrix product [2048, n] x [n, n] (n = 4096; 8192 square on CUDA).

    Of random numbers: a GPU takes less power, and so has a higher clock, for numbers that are all the same.
    """
    inner = size or (8192 if device.type == "cuda" else 4096)
    rows = inner if device.type == "cuda" else inner // 2
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, inner, device=device).to(dtype)
    return _rate(lambda: F.linear(left, right), 2 * rows * inner * inner, repeats, device)


def _rate(work: Callable[[], object], amount: float, repeats: int, device: torch.device) -> dict:
    calls = _CALLS if device.type == "cuda" else 1
    rates = []
    for number in range(repeats + 1):
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:  # the first one pays for pages and kernels
            rates.append(calls * amount / (time.perf_counter() - begin))
    return spread(rates)


class Watch:
    """How many CPUs other processes kept busy while a child of ours ran."""

    def __init__(self):
        self._begin = self._look()

    @staticmethod
    def _look() -> tuple[float, float, float]:
        """Now; CPU seconds of the whole machine; those of our children that have ended, and ours."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
        own = os.times()
        return time.perf_counter(), sum(times) - idle, own.user + own.system + own.children_user + own.children_system

    def others(self) -> float:
        """CPUs, on average since this watch was made; to be asked when the child has ended."""
        now, busy, own = (after - before for after, before in zip(self._look(), self._begin, strict=True))
        return max(0.0, (busy - own) / now) if now > 0 else 0.0


def spread(values: list[float]) -> dict:
    """Median, smallest, largest, and (largest - smallest) / median."""
    middle = statistics.median(values)
    return {
        "median": middle,
        "min": min(values),
        "max": max(values),
        "spread": (max(values) - min(values)) / middle if middle else 0.0,
        "values": values,
    }


def disturbances(figures: dict[str, dict], result: dict) -> list[str]:
    """What makes a row doubtful, in words."""
    found = [
        f"{name} spread {figure['spread']:.0%}" for name, figure in figures.items() if figure["spread"] > LARGEST_SPREAD
    ]
    others = result.get("others_cpus", 0.0)
    return [*found, f"other processes used {others:.1f} CPUs"] if others > LARGEST_LOAD else found


def linear_weights(config: GPTNeoXConfig) -> int:
    """Number of weights of the linear layers, output head included: what each decode step reads."""
    shapes = parameter_shapes(config)
    count = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed_in" not in name)
    return count + (math.prod(shapes["gpt_neox.embed_in.weight"]) if config.tie_word_embeddings else 0)


def bytes_per_step(config: GPTNeoXConfig, number_format: str, held: str | None = None) -> float:
    """Bytes of linear weights that one decode step reads, whatever the batch. The cache is not counted.

    Args:
        config: of the network.
        number_format: of the row.
        held: how our engine keeps linear weights, where it is not that: bf16 ones that are multiplied in float32.
    """
    name = held or number_format
    return linear_weights(config) * (DTYPES[name].itemsize if name in DTYPES else BYTES_PER_WEIGHT[name])


def machine(device: torch.device, threads: int) -> dict:
    """Hardware and versions, for the record."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = {"gpu": _gpu(device)} if device.type == "cuda" else {}
    return {
        **gpu,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "kind": device.type,
        "instructions": _instructions(),
        "threads": threads,
        "cpus": os.cpu_count(),
        "last_cache_bytes": last_cache(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Version of the GPU driver; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Those that decide which kernels run."""
    known = {
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
    }
    return sorted(known & {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()})
