"""`python -m tests.fuzz.run`: every fuzz_*.py beside this file for a share of the time. Prints seeds and counts.

A failure ends with the seed and the number of the case: the same --seed and --only meet it again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import secrets
import sys
import time
from pathlib import Path

from tests import conftest  # noqa: F401  no test reaches a public hub

NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("fuzz_*.py")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240, help="for all together (default: 240)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="(default: a new one)")
    parser.add_argument("--only", choices=NAMES, help="one of them")
    options = parser.parse_args()
    names = (options.only,) if options.only else NAMES
    failed = []
    for name in names:
        begun = time.monotonic()
        print(f"{name}: seed {options.seed}", flush=True)
        try:
            with quiet():
                count = importlib.import_module(f"tests.fuzz.{name}").main(options.seconds / len(names), options.seed)
        except AssertionError as error:
            failed.append(name)
            cause = f"\n  {type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else ""
            print(
                f"{name}: FAILED: {error}{cause}\n  again: python -m tests.fuzz.run --only {name} --seed {options.seed}"
            )
        else:
            print(f"{name}: {count} cases in {time.monotonic() - begun:.0f} s, none failed", flush=True)
    return 1 if failed else 0


@contextlib.contextmanager
def quiet():
    """Without the log lines of ten thousand cases."""
    logger = logging.getLogger("modelscope")
    logger.disabled, before = True, logger.disabled
    ours = logging.getLogger("modelscope.dolly")
    level = ours.level
    ours.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.disabled = before
        ours.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
