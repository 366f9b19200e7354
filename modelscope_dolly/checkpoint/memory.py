"""How much memory a dolly-v2 takes, by arithmetic over the shapes of its parameters: nothing is loaded to find out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.kernels.quantized_linear import BYTES_PER_WEIGHT, is_linear

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig

#: hidden size, layers, heads of the published sizes (config.json of databricks/dolly-v2-3b, -7b, -12b).
SHAPES = {"3b": (2560, 32, 32), "7b": (4096, 32, 32), "12b": (5120, 36, 40)}
VOCABULARY = 50280


class Format(NamedTuple):
    """Bytes of a number that is no linear weight, how linear weights are kept, bytes of a number in the cache."""

    itemsize: int
    method: str | None
    cache_itemsize: int


#: As on a CPU, where int8 and int4 have float32 beside them and a bfloat16 cache; a GPU takes no more.
FORMATS = {
    "fp32": Format(4, None, 4), "fp32/bf16": Format(4, "bf16", 4), "bf16": Format(2, None, 2),
    "int8": Format(4, "int8", 2), "int4": Format(4, "int4", 2),
}  # fmt: skip
#: Weights stored in bf16, multiplied in float32 by the compiled kernels: only the CPU has it.
FP32_OVER_BF16 = "fp32/bf16"


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one model in one format: the weights, and the key/value cache of one answer of the whole window."""

    format: str
    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def shape_config(size: str) -> NetworkConfig:
    """Configuration of a published size."""
    from modelscope_dolly.engine.network_config import NetworkConfig

    hidden, layers, heads = SHAPES[size]
    return NetworkConfig(
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


def weight_bytes(config: NetworkConfig, itemsize: int, method: str | None = None) -> int:
    """Bytes of all parameters in memory; for the arguments see bytes_per_weight."""
    shapes = parameter_shapes(config).items()
    return math.ceil(sum(math.prod(s) * bytes_per_weight(name, s, itemsize, method) for name, s in shapes))


def memory_needs(config: NetworkConfig) -> list[MemoryNeed]:
    """One row per format."""
    numbers = 2 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings  # of keys and values
    return [
        MemoryNeed(name, weight_bytes(config, kept.itemsize, kept.method), numbers * kept.cache_itemsize)
        for name, kept in FORMATS.items()
    ]
