"""Figures of repeated measurements: their spread, and what disturbed them."""

from __future__ import annotations

import os
import statistics
import time

import psutil

#: Repeats further apart than this, relative to their median, were disturbed by something.
LARGEST_SPREAD = 0.15
#: So were those during which other processes kept this many CPUs busy.
LARGEST_LOAD = 0.15


def spread(values: list[float]) -> dict:
    """Median, smallest, largest, and (largest - smallest) / median."""
    median, low, high = statistics.median(values), min(values), max(values)
    return {
        "median": median, "min": low, "max": high, "spread": (high - low) / median if median else 0.0, "values": values
    }  # fmt: skip


def disturbances(figures: dict[str, dict], result: dict) -> list[str]:
    """What makes a row doubtful, in words.

    Args:
        figures: name -> what spread() gave.
        result: of the process that measured them.
    """
    reasons = [
        f"{name} spread {figure['spread']:.0%}" for name, figure in figures.items() if figure["spread"] > LARGEST_SPREAD
    ]
    others = result.get("others_cpus", 0.0)
    return [*reasons, f"other processes used {others:.1f} CPUs"] if others > LARGEST_LOAD else reasons


class OtherLoad:
    """How many CPUs other processes kept busy while a child of ours ran."""

    def __init__(self):
        self._start = self._look()

    @staticmethod
    def _look() -> tuple[float, float, float]:
        """Now; CPU seconds of the whole machine; those of this process and of its children that have ended."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
        own = os.times()
        return time.perf_counter(), sum(times) - idle, own.user + own.system + own.children_user + own.children_system

    def cpus(self) -> float:
        """CPUs, on average since this object was made; to be asked when the child has ended."""
        seconds, busy, own = (after - before for after, before in zip(self._look(), self._start, strict=True))
        return max(0.0, (busy - own) / seconds) if seconds > 0 else 0.0
