"""The learning rate over the optimizer steps of a run, as a factor on its peak."""

from __future__ import annotations

import math
from collections.abc import Callable


def schedule(name: str, warmup: int, total: int) -> Callable[[int], float]:
    """The factor at step 0, 1, ...

    `warmup` is DeepSpeed's WarmupLR with its default logarithmic warm-up (deepspeed/runtime/lr_schedules.py):
    log(step + 1) / log(warmup), then constant; so the first step has rate 0. `cosine` and `linear` warm up linearly and
    end at 0.

    Args:
        name: "warmup", "cosine" or "linear".
        warmup: steps until the peak.
        total: steps of the run.
    """

    def factor(step: int) -> float:
        if name == "warmup":
            return min(1.0, math.log(step + 1) / math.log(max(warmup, 2))) if warmup else 1.0
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return max(0.0, 1 - progress) if name == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
