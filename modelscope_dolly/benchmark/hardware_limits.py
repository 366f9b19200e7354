"""What this machine can do at best, measured, and the bytes that a decode step reads at least.

At batch 1 every weight of a linear layer is read once per token, so a token cannot take less than the bytes of the
weights divided by the rate at which memory is read. In prefill and large batches the limit is the matrix product.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from modelscope_dolly.benchmark import peers
from modelscope_dolly.benchmark.machine import last_cache
from modelscope_dolly.benchmark.repeats import spread
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.hardware import DTYPES, free_memory
from modelscope_dolly.kernels.quantized_linear import BYTES_PER_WEIGHT, is_linear

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig

#: Least bytes of the array that is read, where the size of the last cache is unknown.
_LEAST_ARRAY = 1 << 30
#: Width of the matrices that are read.
_WIDTH = 4096
#: Calls between two looks at the clock on a GPU, which queues them all before the first one ends.
_CALLS = 20


def run_limits(job: dict) -> dict:
    """In the child: bandwidth in bytes/s, and operations/s of torch's matrix product in each of the job's types."""
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    peers.say("bandwidth")
    bandwidth, products = read_bandwidth(device), {}
    for name in job["limits"]:
        peers.say(f"matrix product in {name}")
        products[name] = matrix_peak(device, DTYPES[name])
    return {"bandwidth": bandwidth, "matrix": products}


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
    tried = [rate for size in sizes for rate in _rates(device, size - size % (8 * _WIDTH), repeats)]
    reads, copies = ([rate for rate in tried if (rate["how"] == "copy") == copy] for copy in (False, True))
    best_read, best_copy = (max(rates, key=lambda rate: rate["max"]) for rates in (reads, copies))
    medians = {f"{rate['how']}, {rate['array_bytes']} bytes": rate["median"] for rate in tried}
    return {**best_read, "copy": best_copy, "tried": medians}


def _rates(device: torch.device, size: int, repeats: int) -> list[dict]:
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
    """spread() of `amount` per second of one call of `work`, after a warm-up that pays for pages and kernels."""
    calls = _CALLS if device.type == "cuda" else 1
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(calls * amount / (time.perf_counter() - start))
    return spread(rates[1:])


def linear_weights(config: NetworkConfig) -> int:
    """Number of weights of the linear layers, output head included: what each decode step reads."""
    shapes = parameter_shapes(config)
    count = sum(math.prod(shape) for name, shape in shapes.items() if is_linear(name, shape))
    return count + (math.prod(shapes["gpt_neox.embed_in.weight"]) if config.tie_word_embeddings else 0)


def bytes_per_step(config: NetworkConfig, number_format: str, held: str | None = None) -> float:
    """Bytes of linear weights that one decode step reads, whatever the batch. The cache is not counted.

    Args:
        config: of the network.
        number_format: of the row.
        held: how our engine keeps linear weights, where it is not that: bf16 ones that are multiplied in float32.
    """
    name = held or number_format
    return linear_weights(config) * (DTYPES[name].itemsize if name in DTYPES else BYTES_PER_WEIGHT[name])
