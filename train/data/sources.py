"""What the setting `dataset` names -> rows with known columns: files, or data sets of ModelScope or Hugging Face."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelscope_dolly.checkpoint.download import HUB_ID
from modelscope_dolly.errors import DollyError, SettingError, one_line
from modelscope_dolly.files import path_of
from train.data.entries import DatasetEntry, parse_entries
from train.data.formats import SUFFIXES, ParsedFile, SourceRow, read_rows
from train.data.layouts import FIELDS, Layout, Reduced, Unusable, find_layout

SOURCES = (
    "a .jsonl, .json, .csv or .parquet file, a glob of them or a folder with some, a data set on a hub "
    "ms:OWNER/NAME[/SUBSET][@REVISION][#ROWS] or hf:..., or a downloaded one ms:./FOLDER or hf:./FOLDER"
)
HUB_DATASET = re.compile(
    rf"(?P<id>{HUB_ID.pattern})(/(?P<subset>\w[\w.-]*))?(@(?P<revision>[\w.+/-]+))?(#(?P<rows>[1-9][0-9]{{0,11}}))?",
    re.ASCII,
)
#: Of a glob; one that matches more looks through a whole disk.
MOST_MATCHES = 10_000
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Source:
    """The rows that are taken of one file or data set, as they were read.

    Attributes:
        name: for messages.
        rows: in order.
        layout: how they become fields.
        unused: columns that nothing reads.
        unit: what `SourceRow.line` counts, "line" or "record".
        total: rows before some were drawn.
        entry: of the recipe.
    """

    name: str
    rows: list[SourceRow]
    layout: Layout
    unused: tuple[str, ...]
    unit: str
    total: int
    entry: DatasetEntry

    def reduce(self, row: SourceRow) -> Reduced:
        """The fields of a row that is an object. Raises Unusable."""
        return self.layout.reduce(row.value)


@dataclass(frozen=True)
class Sources:
    """Everything that the setting names, in its order.

    Attributes:
        parts: one for each file or data set.
        sha256: of the fields of all rows in order. The same records have the same hash in any format and layout, in
            one file or in several.
    """

    parts: Sequence[Source]
    sha256: str = field(repr=False)

    @property
    def rows(self) -> list[SourceRow]:
        return [row for part in self.parts for row in part.rows]


def read_records(dataset: Any, columns: Mapping[str, str] | None = None, seed: int = 42) -> Sources:
    """Read the rows of everything that `dataset` names.

    Args:
        dataset: see SOURCES; or a map with `path` and perhaps share, repeat, columns; or a list of these.
        columns: our field name -> the data set's, for entries that have none of their own. Context may be absent.
        seed: of the draw of a share, or of so many rows.

    Raises:
        SettingError: no such data set, or it lacks a column.
        DollyError: a file as a whole is damaged, or holds no record.
    """
    parts: list[Source] = []
    for number, entry in enumerate(parse_entries(dataset)):
        parts += _read_entry(entry, columns or {}, random.Random(f"{seed} {number}"))
    return Sources(parts, _digest(parts))


def _read_entry(entry: DatasetEntry, columns: Mapping[str, str], draw: random.Random) -> Iterator[Source]:
    """One source for each file of an entry. `draw` chooses rows where not all are taken."""
    columns = columns if entry.columns is None else entry.columns
    wanted = None
    if entry.path.startswith(("ms:", "hf:")):
        rows, wanted = _read_hub(entry.path)
        read: Iterable[tuple[str, ParsedFile]] = [(entry.path, ParsedFile(rows, None, "record"))]
    else:
        read = ((str(file), _read_file(file)) for file in _files(entry.path))
    for name, (rows, header, unit) in read:
        if not rows:
            raise DollyError(f"{name}: holds no records")
        if header is None:
            header = list(dict.fromkeys(key for row in rows if row.is_object for key in row.value))
        layout = find_layout(name, header, columns)
        unused = tuple(_printable(column) for column in header if column not in layout.read)
        if wanted is not None and wanted > len(rows):
            raise SettingError(f"dataset {name!r} asks for {wanted:,} rows, and has {len(rows):,}; ask for fewer")
        taken = max(1, round((wanted or len(rows)) * entry.share))
        yield Source(name, _drawn(rows, taken, draw), layout, unused, unit, len(rows), entry)


def _drawn(rows: list[SourceRow], count: int, draw: random.Random) -> list[SourceRow]:
    """`count` of the rows, in their order. random() alone gives the same numbers in every version of Python."""
    if count == len(rows):
        return rows
    drawn = [draw.random() for _ in rows]
    chosen = sorted(sorted(range(len(rows)), key=drawn.__getitem__)[:count])
    return [rows[index] for index in chosen]


def _files(path: str) -> list[Path]:
    """The files that a path names: itself, the matches of a glob, or those in a folder; sorted by name."""
    given = Path(path_of("dataset", path))
    try:
        if given.is_dir():
            found = sorted(file for file in given.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise SettingError(f"dataset {path!r} is a folder without {', '.join(SUFFIXES)} files; it must be "
                                   f"{SOURCES}")  # fmt: skip
            return found
        if not given.exists() and _GLOB.search(path):
            matches = list(itertools.islice(glob.iglob(str(given), recursive=True), MOST_MATCHES + 1))
            if len(matches) > MOST_MATCHES:
                raise SettingError(f"dataset {path!r} matches more than {MOST_MATCHES:,} files; give a narrower one")
            found = sorted(Path(name) for name in matches if Path(name).is_file())
            if not found:
                raise SettingError(f"dataset {path!r} matches no file; it must be {SOURCES}")
            for file in found:
                _check_suffix(str(file))
            return found
    except OSError as error:  # a name that is too long, no permission
        raise _unreadable(path, error) from None
    _check_suffix(path)
    return [given]


def _check_suffix(path: str) -> None:
    if Path(path).suffix.lower() not in SUFFIXES:
        hint = f" For a data set on a hub write ms:{path} or hf:{path}" if HUB_DATASET.fullmatch(path) else ""
        raise SettingError(f"dataset is {path!r}, it must be {SOURCES}.{hint}")


def _read_file(path: Path) -> ParsedFile:
    try:
        return read_rows(path, str(path))
    except OSError as error:
        raise _unreadable(str(path), error) from None


def _unreadable(path: str, error: OSError) -> SettingError:
    return SettingError(f"dataset {path!r} cannot be read: {error.strerror or error}; it must be {SOURCES}")


def _read_hub(dataset: str) -> tuple[list[SourceRow], int | None]:
    """The rows of a data set on a hub or in a folder, and how many of them are wanted; None: all."""
    hub, name = dataset[:2], dataset[3:]
    match, wanted, subset = HUB_DATASET.fullmatch(name), None, None
    if match:
        name, subset, revision = match["id"], match["subset"], match["revision"]
        wanted = int(match["rows"]) if match["rows"] else None
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
        rows = [SourceRow(index, row) for index, row in enumerate(load(name, subset, revision), 1)]
    except Exception as error:  # the libraries' errors have no common base
        raise SettingError(
            f"dataset {dataset!r} cannot be loaded through {library}'s library "
            f"({type(error).__name__}: {one_line(error, 200)}). "
            "Check the name, the subset, the revision, that it has a split 'train', and the network"
        ) from error
    return rows, wanted


def _load_ms(name: str, subset: str | None, revision: str | None) -> Iterable[Any]:
    from modelscope import MsDataset

    version = {"version": revision} if revision else {}
    return MsDataset.load(name, subset_name=subset, split="train", trust_remote_code=False, **version)


def _load_hf(name: str, subset: str | None, revision: str | None) -> Iterable[Any]:
    from datasets import load_dataset

    return load_dataset(name, subset, split="train", revision=revision)


def _digest(parts: Sequence[Source]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for row in part.rows:
            digest.update(json.dumps(_content(part, row)).encode("ascii") + b"\n")
    return digest.hexdigest()


def _content(source: Source, row: SourceRow) -> list[Any]:
    """What is hashed of a row: its fields; of one that has none, what it is."""
    if not row.is_object:
        return [_hashable(row.value)]
    try:
        fields = source.reduce(row).fields
    except Unusable as error:
        return [{"unusable": str(error)}]
    content = [_hashable(fields.get(field)) for field in FIELDS]
    content[1] = content[1] or ""  # no context and an empty one are the same
    return content


def _hashable(value: Any) -> Any:
    """Text as it is; of what cannot be a field, the type, which is the same in every run."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    return value if value is None or isinstance(value, str) else {"type": type(value).__name__}


def _printable(text: str) -> str:
    """With lone surrogates escaped, so that a report can be written to a file."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
