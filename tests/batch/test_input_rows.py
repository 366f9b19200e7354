"""Rows of an input: what each line asks, or why it asks nothing; read one by one."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from modelscope_dolly.batch import input_rows
from modelscope_dolly.batch.input_rows import InputRows, Row
from modelscope_dolly.errors import DollyError, SettingError
from modelscope_dolly.generation import Prompt


def rows_of(tmp_path, content: bytes, name: str = "in.jsonl", format: str | None = None) -> list[Row]:
    (tmp_path / name).write_bytes(content)
    with InputRows(str(tmp_path / name), format, tmp_path) as rows:
        found = list(rows.read(skip=lambda index: False))
        assert len(found) == rows.count
        return found


def test_records_of_the_data_set_and_bad_lines_between_them(tmp_path):
    record = {"instruction": "Who?", "context": "Pepys.", "response": "He.", "category": "closed_qa"}
    lines = [
        json.dumps(record).encode(), b"", b"  ", b'{"text": "Why?", "context": ""}\r', b"not json", b"[1]",
        b'{"context": "nothing asked"}', b'{"instruction": ""}', b'{"instruction": 3}', b'{"text": "caf\xe9"}',
        b'{"messages": [{"role": "system", "content": "C"}, {"role": "user", "content": "Q"}]}',
    ]  # fmt: skip
    found = rows_of(tmp_path, b"\n".join(lines))
    assert [(row.index, row.line) for row in found] == [
        (i, line) for i, line in enumerate([1, 4, 5, 6, 7, 8, 9, 10, 11])
    ]
    assert [found[i].prompt for i in (0, 1, 8)] == [Prompt("Who?", "Pepys."), Prompt("Why?", ""), Prompt("Q", "C")]
    problems = [
        "not JSON",
        "found list",
        "needs either",
        "instruction is empty",
        "must be a string",
        "not JSON in UTF-8",
    ]
    for row, says in zip(found[2:8], problems, strict=True):
        assert row.prompt is None and says in row.problem and "\n" not in row.problem


def test_one_instruction_a_line(tmp_path):
    found = rows_of(tmp_path, b"\xef\xbb\xbfName a colour.\r\n\n  Name a river. \nbad \xff\n{not json}", "in.txt")
    assert [row.prompt.instruction if row.prompt else row.problem for row in found] == [
        "Name a colour.", "Name a river.", "not UTF-8 (byte 0xff at 4)", "{not json}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.jsonl", b"Name a colour.", "jsonl"),
        ("a.txt", b'{"text": "x"}', "lines"),
        ("a", b'\n {"text": "x"}', "jsonl"),
        ("a.md", b"Name a colour.", "lines"),
        ("a", b"", "lines"),
    ],
)
def test_the_format_goes_by_the_name_else_by_the_first_line(tmp_path, name, content, format):
    (tmp_path / name).write_bytes(content)
    with InputRows(str(tmp_path / name), None, tmp_path) as rows:
        assert rows.format == format
    with InputRows(str(tmp_path / name), "lines", tmp_path) as rows:
        assert rows.format == "lines"


def test_standard_input_is_copied_and_has_the_digest_of_a_file(tmp_path, monkeypatch):
    content = b'{"text": "x"}\n{"text": "y"}'
    (tmp_path / "in.jsonl").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    with InputRows("-", None, tmp_path) as piped, InputRows(str(tmp_path / "in.jsonl"), None, tmp_path) as file:
        assert (piped.sha256, piped.count, piped.format) == (file.sha256, file.count, file.format)
        assert list(piped.read(lambda index: index == 0)) == list(file.read(lambda index: index == 0))
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_line_that_is_too_long_is_one_bad_row_and_never_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(input_rows, "LONGEST_LINE", 20)
    found = rows_of(tmp_path, b"short\n" + b"x" * 95 + b"\nshort too", "in.txt")
    assert [(row.line, row.problem) for row in found] == [(1, ""), (2, "longer than 20 bytes"), (3, "")]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\n" + b"x" * 95)))
    with pytest.raises(SettingError, match="standard input: line 2: longer than 20 bytes"):
        InputRows("-", None, tmp_path)


def test_keys_that_mean_nothing_are_remembered_with_their_first_line(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "x"}\n{"text": "x", "contxt": "c", "id": 1}\n{"text": "y", "id": 2}')
    with InputRows(str(tmp_path / "in.jsonl"), None, tmp_path) as rows:
        assert all(row.prompt for row in rows.read(lambda index: False))
        assert rows.unknown_keys == {"'contxt'": 2, "'id'": 2}


@pytest.mark.parametrize(
    ("name", "says"),
    [("none", "no such file"), (".", "is a directory"), ("/dev/zero", "not a regular file; use - and <")],
)
def test_what_is_no_file_is_refused_before_it_is_read(tmp_path, name, says):
    with pytest.raises(SettingError, match=says):
        InputRows(str(tmp_path / name), None, tmp_path)


def test_an_array_and_an_unknown_format_are_refused(tmp_path):
    with pytest.raises(SettingError, match=r"begins with '\['"):
        rows_of(tmp_path, b'[{"text": "x"}]')
    with pytest.raises(SettingError, match=r"unknown format 'json'\. Did you mean 'jsonl'"):
        rows_of(tmp_path, b"", format="json")


def test_a_file_that_is_changed_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("one\ntwo\n")
    with InputRows(str(path), None, tmp_path) as rows:
        path.write_text("one\nTWO\n")
        with pytest.raises(DollyError, match="was changed while it was read"):
            list(rows.read(lambda index: False))
