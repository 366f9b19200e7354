"""One training at a time in a run directory; the lock itself: tests/test_locks.py."""

from __future__ import annotations

import os

import pytest

from modelscope_dolly.errors import DollyError
from train.training.run_lock import NAME, locked


def test_a_second_training_is_refused_and_told_what_to_do(tmp_path):
    with locked(tmp_path), pytest.raises(DollyError) as error, locked(tmp_path):
        pass
    assert f"process {os.getpid()} on" in str(error.value) and "give another output_dir" in str(error.value)


def test_a_directory_that_stayed_empty_is_removed_again_and_one_with_files_is_not(tmp_path):
    with locked(tmp_path / "a" / "b") as (lock, lines):
        assert lines == [] and (tmp_path / "a" / "b" / NAME).exists()
        lock.check()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "run.json").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run.json"]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DollyError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass
