"""A .jsonl, .json, .csv or .parquet file -> rows. A row that cannot be read stays in the list, with its problem.

Of .jsonl and .parquet one line or one batch of rows is held besides the rows; .json and .csv are read as a whole first.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from modelscope_dolly.errors import DollyError, SettingError, one_line
from train.distributed import is_first_process

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8


@dataclass(frozen=True, slots=True)
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


def read_rows(path: Path, name: str) -> ParsedFile:
    """The rows of a file by its suffix, one of SUFFIXES; `name` is how messages call it.

    Raises:
        DollyError: the file as a whole is damaged. OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, name)
    with open(path, "rb") as file:
        beginning = file.read(3)
        if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DollyError(f"{name}: the text is UTF-16, it must be UTF-8; save it again as UTF-8")
        skip = len(codecs.BOM_UTF8) if beginning == codecs.BOM_UTF8 else 0
        file.seek(skip if suffix == ".jsonl" else 0)
        if suffix == ".jsonl":
            return ParsedFile(list(_parse_jsonl(_with_progress(file, path, name), skip)), None, "line")
        data = file.read()
    if suffix == ".csv":
        return _parse_csv(name, data, skip)
    return ParsedFile(_parse_json(name, data, skip), None, "record")


def _with_progress(file: BinaryIO, path: Path, name: str) -> Iterator[bytes]:
    """The lines of a file, with a bar of its bytes on a terminal; disable=None: none elsewhere."""
    with tqdm(total=path.stat().st_size, desc=f"Reading {name}"[:60], unit="B", unit_scale=True, leave=False,
              disable=not is_first_process() or None) as bar:  # fmt: skip
        for line in file:
            bar.update(len(line))
            yield line


def _parse_jsonl(lines: Iterable[bytes], skip: int) -> Iterator[SourceRow]:
    """One JSON value per line; blank lines are not records. The first line begins at byte `skip` of the file."""
    offset = skip
    for number, line in enumerate(lines, 1):
        raw = line.removesuffix(b"\n")
        if raw.strip():
            try:
                yield SourceRow(number, json.loads(raw.decode("utf-8")))
            except UnicodeDecodeError as error:
                detail = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start} of the file"
                yield SourceRow(number, raw.strip(), ("not_utf8", detail))
            except (ValueError, RecursionError) as error:
                yield SourceRow(number, raw.strip(), ("not_json", _json_mistake(error)))
        offset += len(line)


def _read_parquet(path: Path, name: str) -> ParsedFile:
    """Rows as objects, batch by batch."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SettingError(f"{name}: reading .parquet needs pyarrow: pip install pyarrow") from None
    rows: list[SourceRow] = []
    try:
        with ParquetFile(path) as file, tqdm(total=file.metadata.num_rows, desc=f"Reading {name}"[:60], unit="record",
                                             leave=False, disable=not is_first_process() or None) as bar:  # fmt: skip
            header = file.schema_arrow.names
            for batch in file.iter_batches(batch_size=1024):
                rows += (SourceRow(number, row) for number, row in enumerate(batch.to_pylist(), len(rows) + 1))
                bar.update(batch.num_rows)
    except (ArrowException, ValueError) as error:  # also text columns that are not UTF-8
        raise DollyError(f"{name}: not a parquet file that can be read: {one_line(error, 160)}") from None
    return ParsedFile(rows, list(dict.fromkeys(header)), "record")


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
