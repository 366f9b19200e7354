"""Read the rows of a data set: three kinds of files, and the hubs' own libraries. Only the form is judged here."""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import itertools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelscope_dolly.checkpoint.download import HUB_ID
from modelscope_dolly.errors import DollyError, SettingError, one_line, unknown_name

FIELDS = ("instruction", "context", "response")
REQUIRED = ("instruction", "response")
USUAL_NAMES = {
    "instruction": ("question", "prompt", "query"),
    "context": ("input",),
    "response": ("output", "answer", "completion"),
}
SOURCES = (
    "a .jsonl, .json or .csv file, a hub's data set ms:OWNER/NAME[@REVISION] or hf:OWNER/NAME[@REVISION], "
    "or a downloaded one ms:./FOLDER or hf:./FOLDER"
)
_HUB_DATASET = re.compile(rf"(?P<id>{HUB_ID.pattern})(@(?P<revision>\S+))?")
_ESCAPED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is no UTF-8


@dataclass(frozen=True)
class Row:
    """What stands in one place of a source. `problem` is (kind, detail) where it could not even be read."""

    line: int
    value: Any
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class Source:
    """All rows as they were read.

    Attributes:
        name: what the user called it.
        rows: each with its place: the first line of the row in a .jsonl or .csv file, elsewhere its index + 1.
        columns: our field name -> the name in the rows.
        unused: columns that nothing reads.
        unit: what `Row.line` counts, "line" or "record".
        sha256: of the mapped fields in order. The same records have the same hash in any format.
    """

    name: str
    rows: list[Row]
    columns: dict[str, str]
    unused: tuple[str, ...]
    unit: str
    sha256: str


def read_records(dataset: str, columns: Mapping[str, str] | None = None) -> Source:
    """Read every row of `dataset`, which is a file, or a `train` split of ModelScope or Hugging Face.

    Args:
        dataset: see SOURCES.
        columns: our field name -> the data set's, for those that differ. Context may be absent.

    Raises:
        SettingError: no such data set, or it lacks a column.
        DollyError: the file as a whole is damaged, or holds no record.
    """
    if dataset.startswith(("ms:", "hf:")):
        rows, found, unit = _read_hub(dataset), None, "record"
    else:
        rows, found, unit = _read_file(dataset)
    if not rows:
        raise DollyError(f"{dataset}: holds no records")
    if found is None:
        found = list(dict.fromkeys(key for row in rows if is_object(row) for key in row.value))
    mapping = _map_columns(dataset, columns or {}, found)
    unused = tuple(_printable(column) for column in found if column not in mapping.values())
    return Source(dataset, rows, mapping, unused, unit, _digest(rows, mapping))


def _read_file(dataset: str) -> tuple[list[Row], list[str] | None, str]:
    """(rows, columns where the file declares them, unit)."""
    path = Path(dataset).expanduser()
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".json", ".csv"):
        hint = f" For a hub's data set write ms:{dataset} or hf:{dataset}" if _HUB_DATASET.fullmatch(dataset) else ""
        raise SettingError(f"dataset is {dataset!r}, it must be {SOURCES}.{hint}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(f"dataset {dataset!r} cannot be read: {error.strerror}; it must be {SOURCES}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DollyError(f"{dataset}: the text is UTF-16, it must be UTF-8; save it anew as UTF-8")
    skip = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    if kind == ".csv":
        rows, header = _read_csv(dataset, data, skip)
        return rows, header, "line"
    if kind == ".json":
        return _read_json(dataset, data, skip), None, "record"
    return list(_read_jsonl(data, skip)), None, "line"


def _read_jsonl(data: bytes, skip: int) -> Iterator[Row]:
    """One JSON value per line, from byte `skip` on; blank lines are not records."""
    offset = skip
    for line, raw in enumerate(data[skip:].split(b"\n"), 1):
        if raw.strip():
            try:
                yield Row(line, json.loads(raw.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield Row(line, raw.strip(), ("not_utf8", _bad_byte(data, offset + error.start)))
            except (ValueError, RecursionError) as error:
                yield Row(line, raw.strip(), ("not_json", _json_mistake(error)))
        offset += len(raw) + 1


def _read_json(name: str, data: bytes, skip: int) -> list[Row]:
    try:
        value = json.loads(data[skip:].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DollyError(f"{name}: the text must be UTF-8, found {_bad_byte(data, skip + error.start)}") from None
    except (ValueError, RecursionError) as error:
        place = f"line {error.lineno}, " if isinstance(error, json.JSONDecodeError) else ""
        hint = "; if each line holds one record, name the file .jsonl" if "Extra data" in str(error) else ""
        raise DollyError(f"{name}: not JSON: {place}{_json_mistake(error)}{hint}") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DollyError(
            f'{name}: must hold a list of records or {{"data": [...]}}, found {reprlib.repr(value)}; '
            "if each line holds one record, name the file .jsonl"
        )
    return [Row(index, item) for index, item in enumerate(value, 1)]


def _read_csv(name: str, data: bytes, skip: int) -> tuple[list[Row], list[str]]:
    """Rows as objects keyed by the header, and the header. Bytes that are no UTF-8 spoil only their own row."""
    text = data[skip:].decode("utf-8", "surrogateescape")
    parsed = _csv_fields(name, text)
    header = parsed[0][1] if parsed else []
    twice = [column for column, times in Counter(header).items() if times > 1]
    if twice:
        raise DollyError(f"{name}: the header has column {excerpt(twice[0])} more than once; rename one")
    rows, starts = [], None
    for line, fields in parsed[1:]:
        joined = ",".join(fields)
        if _ESCAPED.search(joined):
            starts = starts or _line_starts(text, skip)
            at = _first_bad_byte(data, starts[line - 1])
            rows.append(Row(line, joined.encode("utf-8", "surrogateescape"), ("not_utf8", _bad_byte(data, at))))
        elif len(fields) > len(header):
            detail = f"{len(fields)} fields where the header has {len(header)}: put quotes around a field with commas"
            rows.append(Row(line, joined.encode("utf-8"), ("wrong_type", detail)))
        else:
            rows.append(Row(line, dict(zip(header, fields, strict=False))))
    return rows, header


def _csv_fields(name: str, text: str) -> list[tuple[int, list[str]]]:
    """(first line, fields) of each row that is not blank.

    Strict, because a lenient reader takes an unclosed quote for a field that holds the rest of the file.
    """
    limit = csv.field_size_limit(2**31 - 1)  # of the process; the default of 131,072 characters is an error here
    found, line = [], 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for fields in reader:
            if fields:
                found.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DollyError(
            f"{name}: the row that begins in line {line} is not CSV: {error}; "
            'put quotes around a field with commas, quotes or line breaks, and write " inside as ""'
        ) from None
    finally:
        csv.field_size_limit(limit)
    return found


def _first_bad_byte(data: bytes, begin: int) -> int:
    """Offset of the first byte from `begin` on that is no UTF-8; there is one."""
    try:
        str(memoryview(data)[begin:], "utf-8")
    except UnicodeDecodeError as error:
        return begin + error.start
    raise AssertionError("all bytes are UTF-8")


def _line_starts(text: str, skip: int) -> list[int]:
    """Byte offset of each line, in a file whose first `skip` bytes are not in `text`."""
    lengths = (len(line.encode("utf-8", "surrogateescape")) for line in io.StringIO(text, newline=""))
    return list(itertools.accumulate(lengths, initial=skip))


def _read_hub(dataset: str) -> list[Row]:
    hub, name = dataset[:2], dataset[3:]
    found = _HUB_DATASET.fullmatch(name)
    if found:
        name, revision = found["id"], found["revision"]
        if Path(name).exists():  # both libraries would take it, and ignore the revision
            raise SettingError(
                f"dataset is {dataset!r}, but {name} is also here and would be read in place of the hub's; "
                f"write {hub}:./{name} for the one here, or start in another directory"
            )
    else:
        folder = Path(name).expanduser()
        if not name or not folder.is_dir():
            raise SettingError(f"dataset is {dataset!r}, which is no hub id and no folder here; it must be {SOURCES}")
        name, revision = str(folder.resolve()), None  # a bare `json` would name a reader of the libraries
    load, place = {"ms": (_load_ms, "ModelScope"), "hf": (_load_hf, "Hugging Face")}[hub]
    try:
        return [Row(index, row) for index, row in enumerate(load(name, revision), 1)]
    except Exception as error:  # the libraries' errors have no common base
        raise SettingError(
            f"dataset {dataset!r} cannot be loaded through {place}'s library "
            f"({type(error).__name__}: {one_line(error, 200)}). "
            "Check the name, the revision, that it has a split 'train', and the network"
        ) from error


def _load_ms(name: str, revision: str | None) -> Iterable[Any]:
    from modelscope import MsDataset

    version = {"version": revision} if revision else {}
    return MsDataset.load(name, split="train", trust_remote_code=False, **version)


def _load_hf(name: str, revision: str | None) -> Iterable[Any]:
    from datasets import load_dataset

    return load_dataset(name, split="train", revision=revision)


def _map_columns(name: str, columns: Mapping[str, str], found: list[str]) -> dict[str, str]:
    """Our field name -> theirs. Nothing found means that nothing was readable; the report will say why."""
    wrong = [unknown_name("field in columns", str(field), FIELDS) for field in columns if field not in FIELDS]
    wrong += [f"columns: {field} is {theirs!r}, it must be text" for field, theirs in columns.items()
              if not isinstance(theirs, str)]  # fmt: skip
    if wrong:
        raise SettingError("; ".join(wrong))
    mapping = {field: columns.get(field, field) for field in FIELDS}
    if "context" not in columns and "context" in columns.values():
        del mapping["context"]  # the column of that name holds something else, and there is no context
    twice = [theirs for theirs, times in Counter(mapping.values()).items() if times > 1]
    if twice:
        raise SettingError(f"columns: {excerpt(twice[0])} is taken for more than one of {', '.join(FIELDS)}")
    absent = {field: theirs for field, theirs in mapping.items()
              if (field in REQUIRED or field in columns) and theirs not in found}  # fmt: skip
    if absent and found:
        near = {field: guess for field in absent if (guess := _near(field, absent[field], found))}
        guesses = ", ".join(f"{field}: {guess}" for field, guess in near.items())
        raise SettingError(
            f"{name}: no column {', '.join(map(excerpt, absent.values()))}."
            f"{f' Did you mean columns: {{{guesses}}}?' if near else ''} "
            f"Found: {', '.join(map(excerpt, found[:20]))}. Name them with columns: {{our name: theirs}}"
        )
    return mapping


def _near(field: str, wanted: str, found: list[str]) -> str | None:
    """The column that was probably meant: spelled alike, or another usual name of the field."""
    alike = difflib.get_close_matches(wanted, found, n=1, cutoff=0.6)
    usual = [column for column in (field, *USUAL_NAMES[field]) if column in found]
    return next(iter([*alike, *usual]), None)


def _digest(rows: list[Row], columns: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        content: Any = [_hashed(row.value)]
        if is_object(row):
            content = [_hashed(row.value.get(columns.get(field))) for field in FIELDS]
            content[1] = content[1] or ""  # no context and an empty one are the same
        digest.update(json.dumps(content).encode("ascii") + b"\n")
    return digest.hexdigest()


def _hashed(value: Any) -> Any:
    """Texts as they are; of what cannot be a field, the type, which is the same in every run."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    return value if value is None or isinstance(value, str) else {"type": type(value).__name__}


def is_object(row: Row) -> bool:
    return row.problem is None and isinstance(row.value, Mapping)


def _bad_byte(data: bytes, at: int) -> str:
    return f"byte 0x{data[at]:02x} at offset {at} of the file"


def _json_mistake(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error, 100)


def _printable(text: str) -> str:
    """Without what has no UTF-8 form, so that a report can be written to a file."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def excerpt(value: Any, length: int = 60) -> str:
    """The beginning of `value` in quotes, on one line, nothing unprintable in it."""
    if isinstance(value, bytes):
        value = value[: 4 * length].decode("utf-8", "backslashreplace")
    text = value if isinstance(value, str) else reprlib.repr(value)
    return repr(text if len(text) <= length else f"{text[:length]}...")
