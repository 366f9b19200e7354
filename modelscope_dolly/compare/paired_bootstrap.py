"""An interval for the difference of two held-out losses on the same records (Efron and Tibshirani 1993, chapter 13).

Records are drawn with replacement, each with both of its losses: what makes a record hard for both models cancels out.
The loss is that of all drawn records over all of their tokens, as the training reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
#: Of the interval between two percentiles.
CONFIDENCE = 0.95
_AT_ONCE = 100


class Interval(NamedTuple):
    """A difference per token, and the interval around it; one record has none."""

    difference: float
    low: float | None
    high: float | None


def paired_interval(first: Sequence[float], second: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Interval:
    """Second minus first, in nats per token.

    Args:
        first, second: loss of each record, summed over its tokens; at least one record.
        tokens: of each record, at least one.
        seed: of the draws. The result is the same on every machine.
    """
    differences, counts = np.subtract(second, first, dtype=np.float64), np.asarray(tokens, np.float64)
    difference = float(differences.sum() / counts.sum())
    size = len(counts)
    if size < 2:
        return Interval(difference, None, None)
    generator, drawn = np.random.Generator(np.random.PCG64(seed)), []
    for _ in range(RESAMPLES // _AT_ONCE):
        chosen = generator.integers(0, size, (_AT_ONCE, size))
        drawn.append(differences[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(difference, float(low), float(high))
