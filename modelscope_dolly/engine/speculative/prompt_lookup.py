"""Guesses at the next tokens of an answer, so that one pass can verify several instead of making one.

Decoding reads all weights for each pass, so that a pass over a few tokens costs about as much as a pass over one where
memory is the limit. Guesses come from the text so far (`PromptLookup`: answers copy from their context; Saxena 2023) or
from a smaller network (`draft.py`). The engine draws every token from the network's own logits and keeps a guess only
if it is the token drawn, so that guesses change the speed and never the answer (Leviathan et al. 2023,
arXiv:2211.17192, with coupled draws instead of a rejection step).

How many guesses a pass should verify depends on how good they are and on what a larger pass costs on this machine.
Both are measured while answers are made: `Rate`, `PassCost`, `plan`.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

#: A pass verifies at most so many guesses of one answer.
MOST = 15
#: Guesses less likely than this to be reached and right are not worth a row of the pass.
_WORTH = 0.1
#: Guessing must promise this factor over plain decoding: measured times are noisy.
_GAIN = 1.02
#: After so many passes without any guess, a likely one is tried, in case the measured costs are out of date.
_RETRY = 64


class Guesser(Protocol):
    """Guesses the next tokens of one answer."""

    def add(self, token: int) -> None:
        """`token` is the next one of the answer."""

    def guess(self, most: int) -> tuple[list[int], list[float]]:
        """At most `most` ids, and for each the chance that it is right if those before it are."""


class Rate:
    """How often something went right lately: a mean that forgets, begun at a prior."""

    def __init__(self, prior: float, keep: float = 0.9):
        self._keep, self._right, self._tried = keep, 2 * prior, 2.0

    def add(self, right: bool) -> None:
        self._right = self._keep * self._right + right
        self._tried = self._keep * self._tried + 1

    @property
    def value(self) -> float:
        return self._right / self._tried


class PromptLookup:
    """Guesses that the text goes on as it did after the last place that ended in the same tokens.

    Longer matches are preferred, up to `LONGEST` tokens. The chance of a guess is measured for each length of match on
    every token of the answer, whether the guess was verified by the engine or only compared afterwards, so that a
    guesser that is not asked because it was wrong costs nothing and comes back by itself.

    Args:
        prompt: ids of the prompt.
    """

    LONGEST = 4
    _PRIORS = (0.1, 0.2, 0.4, 0.7)  # by length of match; until measured

    def __init__(self, prompt: Sequence[int]):
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # up to LONGEST tokens -> place after their last occurrence
        self._rates = [Rate(prior) for prior in self._PRIORS]
        self._matched, self._place = 0, 0
        for token in prompt:
            self._append(token)

    def add(self, token: int) -> None:
        if self._matched:
            self._rates[self._matched - 1].add(self._ids[self._place] == token)
        self._append(token)

    def guess(self, most: int) -> tuple[list[int], list[float]]:
        if not self._matched:
            return [], []
        ids: list[int] = []
        for place in range(self._place, self._place + most):
            # beyond the end of the text the guess repeats itself
            ids.append(self._ids[place] if place < len(self._ids) else ids[place - len(self._ids)])
        lengths = (min(self._matched + more, self.LONGEST) for more in range(most))
        return ids, [self._rates[length - 1].value for length in lengths]

    def match(self) -> tuple[int, int]:
        """Length of the longest end of the text that occurred before (at most LONGEST), and the place after it."""
        return self._matched, self._place

    def _append(self, token: int) -> None:
        self._ids.append(token)
        end = len(self._ids)
        self._matched = 0
        for length in range(1, min(self.LONGEST, end) + 1):
            gram = tuple(self._ids[end - length :])
            before = self._after.get(gram)
            self._after[gram] = end
            if before is not None:
                self._matched, self._place = length, before


class PassCost:
    """Seconds of a pass by its number of tokens, measured as passes are made.

    Args:
        slope: until two sizes are measured, each further token is taken to cost this share of the pass.
    """

    def __init__(self, slope: float = 0.1):
        self._slope = slope
        self._recent: dict[int, deque[float]] = {}
        self._typical: dict[int, float] = {}
        self._sizes: list[int] = []

    def add(self, tokens: int, seconds: float) -> None:
        """A pass over `tokens` took `seconds`. The first one of a size also paid for its set-up and does not count."""
        if tokens not in self._recent:
            self._recent[tokens] = deque(maxlen=5)
            return
        self._recent[tokens].append(seconds)
        if len(self._recent[tokens]) < 2:
            return  # one disturbed pass would keep a size from being tried again
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

    def __call__(self, tokens: int) -> float:
        """Seconds that a pass over `tokens` should take: measured, or on the line through the nearest sizes."""
        if tokens in self._typical or not self._sizes:
            return self._typical.get(tokens, 1.0)
        place = bisect_left(self._sizes, tokens)
        if place == 0:
            return self._typical[self._sizes[0]]
        low = self._sizes[place - 1]
        if place < len(self._sizes):
            high = self._sizes[place]
        elif len(self._sizes) > 1:
            low, high = self._sizes[-2], low
        else:
            return self._typical[low] * (1 + self._slope * (tokens - low))
        first, second = self._typical[low], self._typical[high]
        return max(first, first + (second - first) * (tokens - low) / (high - low))


def plan(
    offers: Sequence[Sequence[float]],
    cost: PassCost,
    idle: int = 0,
    drafted: Collection[int] = (),
    draft_cost: float = 0.0,
) -> tuple[list[int], float]:
    """How many guesses of each answer the next pass should verify, and the tokens a second this promises.

    Args:
        offers: for each answer in work, the chances of its guesses, each given that those before it are right.
        cost: of a pass.
        idle: passes since the last guess was verified.
        drafted: places in `offers` whose guesses a draft network is still to make: together, a pass for each depth.
        draft_cost: seconds of such a pass.
    """
    reached = []
    for place, chances in enumerate(offers):
        chance = 1.0
        for one in chances:
            chance *= one
            if chance < _WORTH:
                break
            reached.append((chance, place))
    counts = [0] * len(offers)
    if not reached or not cost.knows(len(offers)):  # what is plain decoding to be compared with?
        return counts, len(offers) / cost(len(offers))
    reached.sort(key=lambda item: -item[0])  # within an answer chances only fall, so its guesses stay in order
    tokens = expected = len(offers)
    plain = tokens / cost(tokens)
    best, most = list(counts), plain
    for chance, place in reached:
        tokens += 1
        if tokens > 2 * max(cost.largest, len(offers)):
            break  # too far from what was measured
        counts[place] += 1
        expected += chance
        depth = max((counts[one] for one in drafted), default=0)
        speed = expected / (cost(tokens) + depth * draft_cost)
        if speed > max(most, _GAIN * plain):
            best, most = list(counts), speed
    chance, place = reached[0]
    if not any(best) and idle >= _RETRY and chance > 0.5 and place not in drafted:
        best[place] = 1
    return best, most
