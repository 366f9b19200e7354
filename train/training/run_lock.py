"""One training at a time in a run directory: the file `run.lock`, see modelscope_dolly/locks.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modelscope_dolly.locks import FileLock, acquire
from train.training.checkpoints import writing

NAME = "run.lock"


@contextmanager
def locked(run: Path) -> Iterator[tuple[FileLock, list[str]]]:
    """Hold the lock of a run directory, which is created, and removed again if nothing was put into it.

    Yields the lock, and lines for people.

    Raises:
        DollyError: another run holds it; or the directory cannot be written.
    """
    created = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
            lock, lines = acquire(run / NAME, run, "give another output_dir")
        try:
            yield lock, lines
        finally:
            lock.release()
    finally:
        with suppress(OSError):  # the first that is not empty
            for folder in created:
                folder.rmdir()
