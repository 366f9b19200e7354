"""Cases of a fuzz run: each from a generator of its own, so that a seed and a number repeat it."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

#: A case that takes longer waits for something that never comes.
_LIMIT_SECONDS = 120


def run_cases(seconds: float, seed: int, case: Callable[[random.Random], Any]) -> int:
    """Call `case` with one generator after another until the time is up, at least once; returns how often.

    Raises:
        AssertionError: a case failed or did not end; names the seed and the number of the case.
    """
    end, number = time.monotonic() + seconds, 0
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        while not number or time.monotonic() < end:
            signal.alarm(_LIMIT_SECONDS)
            try:
                case(random.Random(f"{seed}:{number}"))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                name = f"{case.__module__}: case {number} of seed {seed}"
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            number += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    return number


class TooLong(BaseException):
    """Not an Exception: no handler of the code under test may take it for a damaged file."""


def _too_long(*_: Any) -> None:
    raise TooLong(f"not done after {_LIMIT_SECONDS} seconds")
