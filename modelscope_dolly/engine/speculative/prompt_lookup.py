"""Draft tokens from the text so far: answers copy from their context (Saxena 2023, "prompt lookup decoding")."""

from __future__ import annotations

from collections.abc import Sequence

from modelscope_dolly.engine.speculative.policy import AcceptanceRate


class PromptLookup:
    """Proposes that the text goes on as it did after the last place that ended in the same tokens.

    Longer matches are preferred, up to `LONGEST` tokens. The acceptance rate is measured for each length of match on
    every token of the answer, whether a draft token was verified or only compared afterwards, so that a proposer that
    is not asked because it was wrong costs nothing and comes back by itself.

    Args:
        prompt: ids of the prompt.
    """

    LONGEST = 4
    _PRIORS = (0.1, 0.2, 0.4, 0.7)  # by length of match; until measured

    def __init__(self, prompt: Sequence[int]):
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # up to LONGEST tokens -> place after their last occurrence
        self._rates = [AcceptanceRate(prior) for prior in self._PRIORS]
        self._matched, self._place = 0, 0
        for token in prompt:
            self._extend(token)

    def append(self, token: int) -> None:
        """`token` is the next one of the answer."""
        if self._matched:
            self._rates[self._matched - 1].add(self._ids[self._place] == token)
        self._extend(token)

    def propose(self, limit: int) -> tuple[list[int], list[float]]:
        """At most `limit` draft tokens, and for each the probability of being accepted if those before it are."""
        if not self._matched:
            return [], []
        ids: list[int] = []
        for place in range(self._place, self._place + limit):
            # beyond the end of the text the draft repeats itself
            ids.append(self._ids[place] if place < len(self._ids) else ids[place - len(self._ids)])
        lengths = (min(self._matched + more, self.LONGEST) for more in range(limit))
        return ids, [self._rates[length - 1].value for length in lengths]

    def match(self) -> tuple[int, int]:
        """Length of the longest end of the text that occurred before (at most LONGEST), and the place after it."""
        return self._matched, self._place

    def _extend(self, token: int) -> None:
        self._ids.append(token)
        end = len(self._ids)
        self._matched = 0
        for length in range(1, min(self.LONGEST, end) + 1):
            gram = tuple(self._ids[end - length :])
            before = self._after.get(gram)
            self._after[gram] = end
            if before is not None:
                self._matched, self._place = length, before
