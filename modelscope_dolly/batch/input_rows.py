"""The instructions of a batch: rows of a file or of standard input, read one by one, however many there are."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from modelscope_dolly.errors import DollyError, PromptError, SettingError, shown, unknown_name
from modelscope_dolly.files import file_kind, parse_json_line
from modelscope_dolly.generation import INPUT_KEYS, RECORD_KEYS, Prompt, parse_input

FORMATS = ("jsonl", "lines")
#: What a file's name says about its format.
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "lines"}
#: Bytes of the longest line. A window of 2,048 tokens holds about 10,000 characters.
LONGEST_LINE = 1 << 24
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One line that is not empty.

    Attributes:
        index: among these, from 0.
        line: in the file, from 1.
        prompt: what it asks; or
        problem: why it asks nothing.
    """

    index: int
    line: int
    prompt: Prompt | None = None
    problem: str = ""


class InputRows:
    """The rows of one input. Use it in a `with` block.

    Standard input is first copied to a temporary file: its digest and number of rows are needed before the first
    answer, so that a run that was killed goes on only with the same rows.

    Args:
        name: a file, or "-" for standard input.
        format: "jsonl" or "lines"; None goes by the name (.jsonl, .ndjson, .txt), else by the first line.
        beside: a directory with room for standard input.

    Attributes:
        name: for messages.
        format: "jsonl", objects as in databricks-dolly-15k; or "lines", one instruction a line.
        sha256: of the bytes.
        count: of rows.
        unknown_keys: key of an object that means nothing here -> first line that has it; filled while rows are read.

    Raises:
        SettingError: there is no such file, or it is no file of rows.
    """

    def __init__(self, name: str, format: str | None, beside: Path):
        if format is not None and format not in FORMATS:
            raise SettingError(unknown_name("format", format, FORMATS))
        self.name = "standard input" if name == "-" else name
        self._file = _spooled(beside) if name == "-" else _opened(name)
        try:
            self.sha256, self.count, first = self._scan()
            self.format = format or _SUFFIXES.get(Path(name).suffix.lower()) or _guessed(first)
        except BaseException:
            self._file.close()
            raise
        if self.format == "jsonl" and first.startswith(b"["):
            self._file.close()
            raise SettingError(f"{self.name}: begins with '[': give one JSON object per line, not an array")
        self.unknown_keys: dict[str, int] = {}

    def __enter__(self) -> InputRows:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def same_file(self, path: Path) -> bool:
        """Whether the rows are read from this file."""
        return path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat())

    def read(self, skip: Callable[[int], bool]) -> Iterator[Row]:
        """All rows but those whose index is to be skipped, which are not even parsed.

        Raises:
            DollyError: the file is not what it was when it was opened.
        """
        digest = hashlib.sha256()
        for index, (number, line) in enumerate(_rows(self._file, digest)):
            if not skip(index):
                yield self._row(index, number, line)
        if digest.hexdigest() != self.sha256:
            raise DollyError(
                f"{self.name}: was changed while it was read; --overwrite starts again with what it holds now"
            )

    def _row(self, index: int, number: int, line: bytes) -> Row:
        if len(line) > LONGEST_LINE:
            return Row(index, number, problem=f"longer than {LONGEST_LINE:,} bytes")
        try:
            if self.format == "lines":
                return Row(index, number, parse_input(line.decode("utf-8")))
            value = parse_json_line(line)
            for key in value:
                if key not in INPUT_KEYS | RECORD_KEYS and len(self.unknown_keys) < 100:
                    self.unknown_keys.setdefault(shown(key, 50), number)
            return Row(index, number, parse_input(value, ignore_unknown=True))
        except UnicodeDecodeError as error:
            return Row(index, number, problem=f"not UTF-8 (byte {line[error.start]:#04x} at {error.start})")
        except (PromptError, ValueError) as error:
            return Row(index, number, problem=str(error))

    def _scan(self) -> tuple[str, int, bytes]:
        """SHA-256, number of rows, and the beginning of the first one."""
        digest, count, first = hashlib.sha256(), 0, b""
        for _, line in _rows(self._file, digest):
            count += 1
            first = first or line[:100]
        return digest.hexdigest(), count, first


def _rows(file: BinaryIO, digest: hashlib._Hash) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line that is not empty, of one that is too long its beginning; `digest` sees all."""
    file.seek(0)
    number, inside = 0, False
    while piece := file.readline(LONGEST_LINE + 1):
        digest.update(piece)
        goes_on, inside = inside, not piece.endswith(b"\n")
        if goes_on:
            continue
        number += 1
        if line := (piece.removeprefix(_BYTE_ORDER_MARK) if number == 1 else piece).strip():
            yield number, line


def _guessed(first: bytes) -> str:
    return "jsonl" if first.startswith(b"{") else "lines"


def _opened(name: str) -> BinaryIO:
    kind = file_kind(name)
    if kind != "file":
        reason = {None: "no such file", "directory": "is a directory"}.get(kind, "not a regular file; use - and <")
        raise SettingError(f"{name}: {reason}")
    try:
        return open(name, "rb")
    except OSError as error:
        raise SettingError(f"{name}: cannot be read: {error.strerror}") from None


def _spooled(beside: Path) -> BinaryIO:
    """A copy of standard input, without a name."""
    if sys.stdin is None:
        raise SettingError("standard input is closed: there is nothing to answer")
    copy = tempfile.TemporaryFile(dir=beside)  # noqa: SIM115 (closed by InputRows)
    try:
        number = 0
        while line := sys.stdin.buffer.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:  # a device, perhaps, that never ends
                raise SettingError(f"standard input: line {number}: longer than {LONGEST_LINE:,} bytes")
            copy.write(line)
        copy.flush()
    except BaseException as error:
        copy.close()
        if not isinstance(error, OSError):
            raise
        raise DollyError(f"{beside}: standard input cannot be copied there ({error.strerror})") from None
    return copy
