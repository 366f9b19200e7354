"""Measured step times, and what lies between and beyond them."""

from __future__ import annotations

import pytest

from modelscope_dolly.engine.step_timer import StepTimer
from tests.support.timers import measured


def test_the_median_counts_and_the_first_step_of_a_size_does_not_count():
    timer = StepTimer()
    timer.add(4, 100.0)
    timer.add(4, 70.0)  # nor does a single one
    assert timer.largest == 0
    timer.add(4, 1.0)
    assert (timer.seconds(4), timer.largest) == (1.0, 4)
    for seconds in (1.2, 50.0, 1.1, 0.9):
        timer.add(4, seconds)
    assert (timer.seconds(4), timer.largest) == (1.1, 4)
    for _ in range(5):
        timer.add(4, 3.0)  # the machine has become slower
    assert timer.seconds(4) == 3.0


def test_seconds_between_and_beyond_measured_sizes_is_on_the_line_through_them():
    timer = measured(n2=1.0, n4=2.0, n8=2.4)
    seconds = [timer.seconds(n) for n in (1, 2, 3, 4, 6, 8, 10)]
    assert seconds == pytest.approx([1.0, 1.0, 1.5, 2.0, 2.2, 2.4, 2.6])
    assert measured(n1=2.0).seconds(3) == pytest.approx(2.0 * 1.2)  # one size alone: the slope that was assumed
    assert measured(n1=2.0, n2=1.9).seconds(9) >= 1.9  # more tokens never promise to take less time
