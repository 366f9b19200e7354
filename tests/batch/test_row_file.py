"""Lines that are appended: a process that is killed at any byte leaves a file that the next one goes on with."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.batch import row_file
from modelscope_dolly.batch.row_file import RowFile
from modelscope_dolly.errors import DollyError, SettingError

ROWS = 5


def opened(path: Path, rows: int = ROWS, check=lambda: None) -> RowFile:
    return RowFile(path, rows, check)


def written(path: Path, indices: list[int]) -> bytes:
    file = opened(path)
    for index in indices:
        file.append({"index": index, "text": f"answer {index}: é\u2028 ✓"})
    file.close()
    return path.read_bytes()


def test_lines_are_there_at_once_and_counted_again(tmp_path):
    file = opened(tmp_path / "a.jsonl")
    assert not file.path.exists() and file.count == 0
    file.append({"index": 3, "text": "x\ny"})
    assert json.loads(file.path.read_bytes()) == {"index": 3, "text": "x\ny"}
    assert 3 in file and 2 not in file
    again = opened(file.path)
    assert again.count == 1 and 3 in again and 2 not in again
    file.close()


def test_a_line_torn_at_any_byte_is_removed_and_written_again(tmp_path):
    whole = written(tmp_path / "whole.jsonl", [4, 0, 2])
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    torn = tmp_path / "torn.jsonl"
    for length in range(len(whole) + 1):
        torn.write_bytes(whole[:length])
        file = opened(torn)
        kept = [end for end in ends if end <= length]
        assert file.count == len(kept) and torn.stat().st_size == max(kept, default=0)
        for index in [4, 0, 2][len(kept) :]:
            file.append({"index": index, "text": f"answer {index}: é\u2028 ✓"})
        file.close()
        assert torn.read_bytes() == whole


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(ROWS)), st.integers(0, ROWS))
def test_sorting_gives_the_order_of_the_input_whatever_the_order_was(tmp_path_factory, order, count):
    path = tmp_path_factory.mktemp("sort", numbered=True) / "a.jsonl"
    lines = written(path, order[:count]).splitlines(keepends=True) if count else []
    file = opened(path)
    file.sort()
    assert b"".join(sorted(lines)) == (path.read_bytes() if count else b"")
    assert file.count == count and [name for name in os.listdir(path.parent) if name != path.name] == []
    file.append({"index": 0}) if 0 not in file else None  # it can be gone on with
    file.close()
    assert opened(path).count == max(count, file.count)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"not JSON\n", "not JSON in UTF-8"),
        (b"[]\n", "found list"),
        (b'{"text": ""}\n', "its index is None"),
        (b'{"index": 5}\n', "its index is 5, it must be from 0 to 4"),
        (b'{"index": true}\n', "its index is True"),
        (b'{"index": 1}\n{"index": 1}\n', "row 1 stands there twice"),
    ],
)
def test_what_no_run_has_written_is_refused_and_left_alone(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    content = b'{"index": 0}\n' + line + b'{"ind'
    path.write_bytes(content)
    with pytest.raises(SettingError, match=rf"a\.jsonl:[23]: no line of this run \(.*{says}"):
        opened(path)
    assert path.read_bytes() == content


def test_a_disk_that_is_full_leaves_whole_lines_and_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    file = opened(path)
    file.append({"index": 0})
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 8:
            return write(descriptor, data[:8])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DollyError, match=r"cannot be written \(No space left on device\); its 1 lines are whole"):
        file.append({"index": 1, "text": "longer"})
    monkeypatch.undo()
    file.close()
    assert path.read_bytes() == b'{"index": 0}\n'


def test_a_sort_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    before = written(path, [2, 1])

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DollyError, match=r"cannot be sorted \(No space left on device\); it is complete"):
        opened(path).sort()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.jsonl"]


def test_a_run_that_may_write_no_longer_stops_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(row_file, "SYNC_EVERY", -1.0)

    def gone() -> None:
        raise DollyError("taken over")

    file = opened(tmp_path / "a.jsonl", check=gone)
    with pytest.raises(DollyError, match="taken over"):
        file.append({"index": 0})
    assert not file.path.exists()
