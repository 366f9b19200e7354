"""Where a batch writes: the file of answers, and what stands beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from modelscope_dolly.errors import SettingError, shown
from modelscope_dolly.files import file_kind, path_of


class OutputPaths(NamedTuple):
    """NAME.jsonl, and the files beside it."""

    answers: Path
    problems: Path  # rows that cannot be answered
    description: Path  # what the answers are made with
    lock: Path


def output_paths(output: str) -> OutputPaths:
    """The paths for a file of answers. Raises SettingError where there can be no such file."""
    path = Path(os.path.realpath(path_of("output", output)))
    if path.suffix != ".jsonl":
        raise SettingError(f"output is {shown(output)}, its name must end in .jsonl")
    if file_kind(path) not in (None, "file"):
        raise SettingError(f"{path}: not a file; answers are kept in one, so that a run that was stopped can go on")
    if file_kind(path.parent) != "directory":
        raise SettingError(f"{path.parent}: no such directory")
    beside = (path.with_name(f"{path.stem}.{kind}") for kind in ("errors.jsonl", "batch.json", "lock"))
    return OutputPaths(path, *beside)
