"""The bytes of a .jsonl, .json or .csv file -> rows. A row that cannot be read stays in the list, with its problem."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from modelscope_dolly.errors import DollyError, one_line

SUFFIXES = (".jsonl", ".json", ".csv")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8


@dataclass(frozen=True)
class SourceRow:
    """One row of a data set.

    Attributes:
        line: its first line in a .jsonl or .csv file, elsewhere its index + 1.
        value: as it was parsed; the raw bytes where it could not be.
        problem: (kind, detail) of a row that could not be read.
    """

    line: int
    value: Any
    problem: tuple[str, str] | None = None

    @property
    def is_object(self) -> bool:
        return self.problem is None and isinstance(self.value, Mapping)


class ParsedFile(NamedTuple):
    """The rows of a file, the columns that its header declares (None: it has no header), and what `line` counts."""

    rows: list[SourceRow]
    header: list[str] | None
    unit: str


def parse_file(name: str, suffix: str, data: bytes) -> ParsedFile:
    """Parse the content of a file by its suffix, one of SUFFIXES.

    Raises:
        DollyError: the file as a whole is damaged; `name` is how the message calls it.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DollyError(f"{name}: the text is UTF-16, it must be UTF-8; save it again as UTF-8")
    skip = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    if suffix == ".csv":
        return _parse_csv(name, data, skip)
    if suffix == ".json":
        return ParsedFile(_parse_json(name, data, skip), None, "record")
    return ParsedFile(list(_parse_jsonl(data, skip)), None, "line")


def _parse_jsonl(data: bytes, skip: int) -> Iterator[SourceRow]:
    """One JSON value per line, from byte `skip` on; blank lines are not records."""
    offset = skip
    for line, raw in enumerate(data[skip:].split(b"\n"), 1):
        if raw.strip():
            try:
                yield SourceRow(line, json.loads(raw.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield SourceRow(line, raw.strip(), ("not_utf8", _bad_byte(data, offset + error.start)))
            except (ValueError, RecursionError) as error:
                yield SourceRow(line, raw.strip(), ("not_json", _json_mistake(error)))
        offset += len(raw) + 1


def _parse_json(name: str, data: bytes, skip: int) -> list[SourceRow]:
    """A list of records, or an object with such a list under "data"."""
    try:
        value = json.loads(data[skip:].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DollyError(f"{name}: the text must be UTF-8, found {_bad_byte(data, skip + error.start)}") from None
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}, " if isinstance(error, json.JSONDecodeError) else ""
        hint = "; if each line holds one record, name the file .jsonl" if "Extra data" in str(error) else ""
        raise DollyError(f"{name}: not JSON: {where}{_json_mistake(error)}{hint}") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DollyError(
            f'{name}: must hold a list of records or {{"data": [...]}}, found {reprlib.repr(value)}; '
            "if each line holds one record, name the file .jsonl"
        )
    return [SourceRow(index, item) for index, item in enumerate(value, 1)]


def _parse_csv(name: str, data: bytes, skip: int) -> ParsedFile:
    """Rows as objects keyed by the header. Bytes that are not UTF-8 spoil only their own row."""
    text = data[skip:].decode("utf-8", "surrogateescape")
    parsed = _csv_fields(name, text)
    header = parsed[0][1] if parsed else []
    repeated = [column for column, times in Counter(header).items() if times > 1]
    if repeated:
        raise DollyError(f"{name}: the header has column {excerpt(repeated[0])} more than once; rename one")
    rows, starts = [], None
    for line, fields in parsed[1:]:
        joined = ",".join(fields)
        if _ESCAPED_BYTE.search(joined):
            starts = starts or _line_starts(text, skip)
            raw = joined.encode("utf-8", "surrogateescape")
            rows.append(SourceRow(line, raw, ("not_utf8", _bad_byte(data, _first_bad_byte(data, starts[line - 1])))))
        elif len(fields) > len(header):
            detail = f"{len(fields)} fields where the header has {len(header)}: put quotes around a field with commas"
            rows.append(SourceRow(line, joined.encode("utf-8"), ("wrong_type", detail)))
        else:
            rows.append(SourceRow(line, dict(zip(header, fields, strict=False))))
    return ParsedFile(rows, header, "line")


def _csv_fields(name: str, text: str) -> list[tuple[int, list[str]]]:
    """(first line, fields) of each row that is not blank.

    Strict, because a lenient reader takes an unclosed quote for a field that holds the rest of the file.
    """
    limit = csv.field_size_limit(2**31 - 1)  # global to the process; the default of 131,072 characters is an error here
    parsed, line = [], 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for fields in reader:
            if fields:
                parsed.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DollyError(
            f"{name}: the row that begins in line {line} is not CSV: {error}; "
            'put quotes around a field with commas, quotes or line breaks, and write " inside as ""'
        ) from None
    finally:
        csv.field_size_limit(limit)
    return parsed


def _first_bad_byte(data: bytes, begin: int) -> int:
    """Offset of the first byte from `begin` on that is not UTF-8; there is one."""
    try:
        str(memoryview(data)[begin:], "utf-8")
    except UnicodeDecodeError as error:
        return begin + error.start
    raise AssertionError("all bytes are UTF-8")


def _line_starts(text: str, skip: int) -> list[int]:
    """Byte offset of each line, in a file whose first `skip` bytes are not in `text`."""
    lengths = (len(line.encode("utf-8", "surrogateescape")) for line in io.StringIO(text, newline=""))
    return list(itertools.accumulate(lengths, initial=skip))


def _bad_byte(data: bytes, offset: int) -> str:
    return f"byte 0x{data[offset]:02x} at offset {offset} of the file"


def _json_mistake(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error, 100)


def excerpt(value: Any, length: int = 60) -> str:
    """The beginning of `value` in quotes, on one line, with unprintable characters escaped."""
    if isinstance(value, bytes):
        value = value[: 4 * length].decode("utf-8", "backslashreplace")
    text = value if isinstance(value, str) else reprlib.repr(value)
    return repr(text if len(text) <= length else f"{text[:length]}...")
