"""On a CPU torch computes linear layers and GELU through oneDNN, which compiles code for each shape that it meets and
keeps it: 0.7 MB for each number of rows of each layer. What is kept also lies between temporary tensors, whose memory
the C library then cannot give back. Rows are therefore filled up to one of few numbers, and go through GELU in pieces.

Each row is computed by itself, so what fills up changes no other row; it is cut off again before anything reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

#: Numbers of rows in each octave, from one power of two to the next: filling up adds an eighth at most, and 5 % on
#: average.
_PER_OCTAVE = 8


def bounded(count: int) -> int:
    """The smallest allowed number of rows that is at least `count`: every one to 16, then 18, 20, ... 32, 36, ..."""
    step = (1 << (count - 1).bit_length()) // (2 * _PER_OCTAVE)
    return count if step < 2 else -(-count // step) * step


def fill_up(tensor: torch.Tensor, count: int, dim: int = 0) -> torch.Tensor:
    """The tensor with zeros behind its entries along `dim`, `count` in all."""
    missing = count - tensor.shape[dim]
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]) if missing else tensor


def in_pieces(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """A function of each number by itself, computed for 1, 2, 4, 8, ... rows at a time."""
    sizes = [1 << bit for bit in reversed(range(len(rows).bit_length())) if len(rows) >> bit & 1]
    return torch.cat([function(piece) for piece in rows.split(sizes)]) if len(sizes) > 1 else function(rows)
