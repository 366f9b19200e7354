"""How long steps take on this machine, measured while they are made."""

from __future__ import annotations

import statistics
from bisect import bisect_left, insort
from collections import deque


class StepTimer:
    """Seconds of a decode step by its number of tokens.

    Args:
        slope: until two sizes are measured, each further token is taken to cost this share of the step.
    """

    def __init__(self, slope: float = 0.1):
        self._slope = slope
        self._recent: dict[int, deque[float]] = {}
        self._typical: dict[int, float] = {}
        self._sizes: list[int] = []

    def add(self, tokens: int, seconds: float) -> None:
        """A step over `tokens` took `seconds`. The first one of a size also paid for its set-up and does not count."""
        if tokens not in self._recent:
            self._recent[tokens] = deque(maxlen=5)
            return
        self._recent[tokens].append(seconds)
        if len(self._recent[tokens]) < 2:
            return  # one disturbed step would keep a size from being tried again
        self._typical[tokens] = statistics.median_low(self._recent[tokens])
        if tokens not in self._sizes:
            insort(self._sizes, tokens)

    @property
    def largest(self) -> int:
        """The largest size measured; 0 before the first measurement."""
        return self._sizes[-1] if self._sizes else 0

    def knows(self, tokens: int) -> bool:
        """Whether a size that small has been measured."""
        return bool(self._sizes) and self._sizes[0] <= tokens

    def seconds(self, tokens: int) -> float:
        """What a step over `tokens` should take: measured, or on the line through the nearest sizes."""
        if tokens in self._typical or not self._sizes:
            return self._typical.get(tokens, 1.0)
        above = bisect_left(self._sizes, tokens)
        if above == 0:
            return self._typical[self._sizes[0]]
        low = self._sizes[above - 1]
        if above < len(self._sizes):
            high = self._sizes[above]
        elif len(self._sizes) > 1:
            low, high = self._sizes[-2], low
        else:
            return self._typical[low] * (1 + self._slope * (tokens - low))
        first, second = self._typical[low], self._typical[high]
        return max(first, first + (second - first) * (tokens - low) / (high - low))
