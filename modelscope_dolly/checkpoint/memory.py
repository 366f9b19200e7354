"""How much memory a dolly-v2 takes, by arithmetic over the shapes of its parameters: nothing is loaded to find out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.hardware import cpu_computes_bf16
from modelscope_dolly.kernels.quantized_linear import BYTES_PER_WEIGHT, METHODS, is_linear

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

#: hidden size, layers, heads of the published sizes (config.json of databricks/dolly-v2-3b, -7b, -12b).
SHAPES = {"3b": (2560, 32, 32), "7b": (4096, 32, 32), "12b": (5120, 36, 40)}
VOCABULARY = 50280

#: Format -> bytes of a number that is no linear weight, and how linear weights are kept (see bytes_per_weight).
FORMATS = {"fp32": (4, None), "fp32/bf16": (4, "bf16"), "bf16": (2, None), "int8": (2, "int8"), "int4": (2, "int4")}
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


def memory_needs(config: GPTNeoXConfig) -> list[MemoryNeed]:
    """One row per format. What is not quantised is in the number type that this CPU computes."""
    numbers = 2 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings  # of keys and values
    rows = []
    for name, (itemsize, method) in FORMATS.items():
        if name in METHODS and not cpu_computes_bf16():
            itemsize = 4
        rows.append(MemoryNeed(name, weight_bytes(config, itemsize, method), numbers * itemsize))
    return rows
