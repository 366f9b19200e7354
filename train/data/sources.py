"""What the setting `dataset` names -> rows with known columns: a file, or a data set of ModelScope or Hugging Face."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelscope_dolly.checkpoint.download import HUB_ID
from modelscope_dolly.errors import DollyError, SettingError, one_line, unknown_name
from train.data.formats import SUFFIXES, ParsedFile, SourceRow, excerpt, parse_file

FIELDS = ("instruction", "context", "response")
REQUIRED = ("instruction", "response")
#: What other data sets call our fields.
USUAL_NAMES = {
    "instruction": ("question", "prompt", "query"),
    "context": ("input",),
    "response": ("output", "answer", "completion"),
}
SOURCES = (
    "a .jsonl, .json or .csv file, a data set on a hub ms:OWNER/NAME[@REVISION] or hf:OWNER/NAME[@REVISION], "
    "or a downloaded one ms:./FOLDER or hf:./FOLDER"
)
_HUB_DATASET = re.compile(rf"(?P<id>{HUB_ID.pattern})(@(?P<revision>\S+))?")


@dataclass(frozen=True)
class Source:
    """All rows as they were read.

    Attributes:
        name: as the user gave it.
        rows: in order.
        columns: our field name -> the name in the rows.
        unused: columns that nothing reads.
        unit: what `SourceRow.line` counts, "line" or "record".
        sha256: of the mapped fields in order. The same records have the same hash in any format.
    """

    name: str
    rows: list[SourceRow]
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
    from_hub = dataset.startswith(("ms:", "hf:"))
    rows, header, unit = ParsedFile(_read_hub(dataset), None, "record") if from_hub else _read_file(dataset)
    if not rows:
        raise DollyError(f"{dataset}: holds no records")
    if header is None:
        header = list(dict.fromkeys(key for row in rows if row.is_object for key in row.value))
    mapping = _map_columns(dataset, columns or {}, header)
    unused = tuple(_printable(column) for column in header if column not in mapping.values())
    return Source(dataset, rows, mapping, unused, unit, _digest(rows, mapping))


def _read_file(dataset: str) -> ParsedFile:
    path = Path(dataset).expanduser()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        hint = f" For a data set on a hub write ms:{dataset} or hf:{dataset}" if _HUB_DATASET.fullmatch(dataset) else ""
        raise SettingError(f"dataset is {dataset!r}, it must be {SOURCES}.{hint}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(f"dataset {dataset!r} cannot be read: {error.strerror}; it must be {SOURCES}") from None
    return parse_file(dataset, suffix, data)


def _read_hub(dataset: str) -> list[SourceRow]:
    hub, name = dataset[:2], dataset[3:]
    match = _HUB_DATASET.fullmatch(name)
    if match:
        name, revision = match["id"], match["revision"]
        if Path(name).exists():  # both libraries would take it, and ignore the revision
            raise SettingError(
                f"dataset is {dataset!r}, but {name} also exists here and would be read in place of the hub's; "
                f"write {hub}:./{name} for the local one, or start in another directory"
            )
    else:
        folder = Path(name).expanduser()
        if not name or not folder.is_dir():
            raise SettingError(f"dataset is {dataset!r}, which is no hub id and no folder here; it must be {SOURCES}")
        name, revision = str(folder.resolve()), None  # a bare `json` would name a reader of the libraries
    load, library = {"ms": (_load_ms, "ModelScope"), "hf": (_load_hf, "Hugging Face")}[hub]
    try:
        return [SourceRow(index, row) for index, row in enumerate(load(name, revision), 1)]
    except Exception as error:  # the libraries' errors have no common base
        raise SettingError(
            f"dataset {dataset!r} cannot be loaded through {library}'s library "
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


def _map_columns(name: str, columns: Mapping[str, str], header: list[str]) -> dict[str, str]:
    """Our field name -> theirs. An empty header means that no row was readable; the report will say why."""
    wrong = [unknown_name("field in columns", str(field), FIELDS) for field in columns if field not in FIELDS]
    wrong += [f"columns: {field} is {theirs!r}, it must be text" for field, theirs in columns.items()
              if not isinstance(theirs, str)]  # fmt: skip
    if wrong:
        raise SettingError("; ".join(wrong))
    mapping = {field: columns.get(field, field) for field in FIELDS}
    if "context" not in columns and "context" in columns.values():
        del mapping["context"]  # the column of that name holds something else, and there is no context
    repeated = [theirs for theirs, times in Counter(mapping.values()).items() if times > 1]
    if repeated:
        raise SettingError(f"columns: {excerpt(repeated[0])} is taken for more than one of {', '.join(FIELDS)}")
    absent = {field: theirs for field, theirs in mapping.items()
              if (field in REQUIRED or field in columns) and theirs not in header}  # fmt: skip
    if absent and header:
        similar = {field: column for field in absent if (column := _similar(field, absent[field], header))}
        suggestion = ", ".join(f"{field}: {column}" for field, column in similar.items())
        raise SettingError(
            f"{name}: no column {', '.join(map(excerpt, absent.values()))}."
            f"{f' Did you mean columns: {{{suggestion}}}?' if similar else ''} "
            f"Found: {', '.join(map(excerpt, header[:20]))}. Name them with columns: {{our name: theirs}}"
        )
    return mapping


def _similar(field: str, wanted: str, header: list[str]) -> str | None:
    """The column that was probably meant: spelled alike, or another usual name of the field."""
    alike = difflib.get_close_matches(wanted, header, n=1, cutoff=0.6)
    usual = [column for column in (field, *USUAL_NAMES[field]) if column in header]
    return next(iter([*alike, *usual]), None)


def _digest(rows: list[SourceRow], columns: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        content: Any = [_hashable(row.value)]
        if row.is_object:
            content = [_hashable(row.value.get(columns.get(field))) for field in FIELDS]
            content[1] = content[1] or ""  # no context and an empty one are the same
        digest.update(json.dumps(content).encode("ascii") + b"\n")
    return digest.hexdigest()


def _hashable(value: Any) -> Any:
    """Text as it is; of what cannot be a field, the type, which is the same in every run."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    return value if value is None or isinstance(value, str) else {"type": type(value).__name__}


def _printable(text: str) -> str:
    """With lone surrogates escaped, so that a report can be written to a file."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
