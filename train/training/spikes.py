"""Steps that stand out of a run: where loss, gradient norm or learning rate jump, for the log and report.md."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

#: Steps before it that a step is compared with, and the fewest of them.
WINDOW, LEAST = 50, 10
#: How far above their median a value stands out: in median absolute deviations times 1.4826, which is a standard
#: deviation of normal noise, and as a factor, because a run that goes smoothly has hardly any deviation.
DEVIATIONS, FACTORS = 6.0, {"loss": 1.25, "grad_norm": 3.0}
#: A learning rate stands out where it rises by this share of the highest so far from one step to the next: a schedule
#: does so in its warm-up only, a resume with another setting whenever it comes.
RISE = 0.2
_WORDS = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}


class Spike(NamedTuple):
    """A value of one step, and what was usual before it."""

    step: int
    name: str
    value: float
    usual: float

    def __str__(self) -> str:
        return f"step {self.step}: {_WORDS[self.name]} {self.value:.4g}, {self.usual:.4g} in the steps before"


class SpikeDetector:
    """Takes the rows of metrics.jsonl one by one.

    Args:
        warmup_steps: of the schedule; until then the learning rate rises.
    """

    def __init__(self, warmup_steps: int = 0):
        self.warmup_steps = warmup_steps
        self._before = {name: deque(maxlen=WINDOW) for name in FACTORS}
        self._rate: float | None = None
        self._highest = 0.0

    def add(self, row: dict) -> list[Spike]:
        """What stands out of this row."""
        found = [spike for name in FACTORS if (spike := self._compare(row, name))]
        rate = row.get("lr")
        if isinstance(rate, (int, float)):
            before, self._rate = self._rate, rate
            self._highest = max(self._highest, rate)
            if before is not None and row["step"] > self.warmup_steps + 1 and rate - before > RISE * self._highest:
                found.append(Spike(row["step"], "lr", rate, before))
        return found

    def _compare(self, row: dict, name: str) -> Spike | None:
        value, before = row.get(name), self._before[name]
        if not isinstance(value, (int, float)):
            return None
        spike = None
        if len(before) >= LEAST:
            usual = statistics.median(before)
            deviation = 1.4826 * statistics.median(abs(other - usual) for other in before)
            # Not `<=`: a value that is not a number stands out.
            if not (value <= usual + DEVIATIONS * deviation or value <= FACTORS[name] * usual):
                spike = Spike(row["step"], name, value, usual)
        before.append(value)
        return spike


def spikes(rows: Iterable[dict], warmup_steps: int = 0) -> list[Spike]:
    """What stands out of the training rows of a run, in step order."""
    detector = SpikeDetector(warmup_steps)
    return [spike for row in rows for spike in detector.add(row)]
