"""How many draft tokens a step should verify, from how often they are accepted and what a larger step costs here.

Both are measured while tokens are made: AcceptanceRate, StepTimer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from operator import mul

from modelscope_dolly.engine.step_timer import StepTimer

#: A step verifies at most so many draft tokens of one sequence.
MAX_DRAFT_TOKENS = 15
#: Draft tokens less likely than this to be reached and accepted are not worth a row of the step.
_LEAST_LIKELY = 0.1
#: Verification must promise this factor over plain decoding: measured times are noisy.
_LEAST_GAIN = 1.02
#: After so many steps without any draft token, a likely one is tried, in case the measured times are out of date.
_RETRY_STEPS = 64


class AcceptanceRate:
    """How often draft tokens were accepted lately: an exponential moving average that starts at a prior."""

    def __init__(self, prior: float, keep: float = 0.9):
        self._keep, self._accepted, self._proposed = keep, 2 * prior, 2.0

    def add(self, accepted: bool) -> None:
        self._accepted = self._keep * self._accepted + accepted
        self._proposed = self._keep * self._proposed + 1

    @property
    def value(self) -> float:
        return self._accepted / self._proposed


def expected_accepted(probabilities: Sequence[float]) -> float:
    """Draft tokens that will be accepted on average, given the probability of each if those before it are."""
    return sum(accumulate(probabilities, mul))


def draft_lengths(
    offers: Sequence[Sequence[float]],
    timer: StepTimer,
    idle: int = 0,
    drafted: Collection[int] = (),
    draft_seconds: float = 0.0,
) -> tuple[list[int], float]:
    """How many draft tokens of each sequence the next step should verify, and the tokens per second this promises.

    Args:
        offers: for each sequence the acceptance probabilities of its draft tokens, each given those before it.
        timer: of steps.
        idle: steps since draft tokens were last verified.
        drafted: places in `offers` whose tokens a draft network is still to make: together, a step for each depth.
        draft_seconds: of such a step.
    """
    reached = []
    for place, probabilities in enumerate(offers):
        for reach in accumulate(probabilities, mul):
            if reach < _LEAST_LIKELY:
                break
            reached.append((reach, place))
    counts = [0] * len(offers)
    plain = len(offers) / timer.seconds(len(offers))
    if not reached or not timer.knows(len(offers)):  # what is plain decoding to be compared with?
        return counts, plain
    reached.sort(key=lambda item: -item[0])  # within a sequence the order stays: its probabilities only fall
    tokens = expected = len(offers)
    best, most = list(counts), plain
    for reach, place in reached:
        tokens += 1
        if tokens > 2 * max(timer.largest, len(offers)):
            break  # too far from what was measured
        counts[place] += 1
        expected += reach
        depth = max((counts[other] for other in drafted), default=0)
        speed = expected / (timer.seconds(tokens) + depth * draft_seconds)
        if speed > max(most, _LEAST_GAIN * plain):
            best, most = list(counts), speed
    reach, place = reached[0]
    if not any(best) and idle >= _RETRY_STEPS and reach > 0.5 and place not in drafted:
        best[place] = 1
    return best, most
