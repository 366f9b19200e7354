"""The setting `dataset` -> the entries of a mix: what each names, how much is taken of it, how often it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelscope_dolly.errors import SettingError, unknown_name
from train.recipe_file import shown

KEYS = ("path", "share", "repeat", "columns")
#: Copies of a record in one epoch; more is a mistake.
MOST_REPEATS = 1000
#: Entries of one recipe; a folder or a glob is one entry.
MOST_ENTRIES = 1000


@dataclass(frozen=True)
class DatasetEntry:
    """One entry of `dataset`.

    Attributes:
        path: a file, a glob, a folder, or a data set on a hub, as it was written.
        share: part of its rows that is taken, drawn by the seed.
        repeat: how often each of its training records is shown in an epoch.
        columns: of this entry alone; None: those of the recipe.
    """

    path: str
    share: float = 1.0
    repeat: int = 1
    columns: Mapping[str, str] | None = None


def parse_entries(dataset: Any) -> list[DatasetEntry]:
    """The entries of the setting: a text, a map with `path`, or a list of these.

    Raises:
        SettingError: names every entry that is wrong, its value, and what is allowed.
    """
    values = dataset if isinstance(dataset, (list, tuple)) else [dataset]
    if not 1 <= len(values) <= MOST_ENTRIES:
        raise SettingError(f"dataset has {len(values):,} entries, it must have 1 to {MOST_ENTRIES:,}")
    entries, problems = [], []
    for number, value in enumerate(values, 1):
        name = f"entry {number} of dataset" if isinstance(dataset, (list, tuple)) else "dataset"
        found = _problems(name, value)
        problems += found
        if not found:
            entries.append(DatasetEntry(value) if isinstance(value, str) else DatasetEntry(**_typed(value)))
    if problems:
        raise SettingError("; ".join(problems))
    return entries


def dataset_name(dataset: Any) -> str | list[str]:
    """What the entries name, for run.json and the model card: a text where there is one entry."""
    names = [entry.path for entry in parse_entries(dataset)]
    return names[0] if len(names) == 1 else names


def _typed(value: Mapping[str, Any]) -> dict[str, Any]:
    return {**value, **({"share": float(value["share"])} if "share" in value else {})}


def _problems(name: str, value: Any) -> list[str]:
    """Everything that is wrong with one entry."""
    if isinstance(value, str) and value:
        return []
    if not isinstance(value, Mapping):
        return [f"{name} is {shown(value)}, it must be text, or a map with path and perhaps share, repeat, columns"]
    unknown = [unknown_name(f"key in {name}", str(key), KEYS) for key in value if key not in KEYS]
    if unknown:
        return unknown
    path, share, repeat = value.get("path"), value.get("share", 1.0), value.get("repeat", 1)
    problems = []
    if not isinstance(path, str) or not path:
        problems.append(f"{name}: path is {shown(path)}, it must be text")
    number = isinstance(share, (int, float)) and not isinstance(share, bool) and math.isfinite(share)
    if not number or not 0 < share <= 1:
        problems.append(f"{name}: share is {shown(share)}, it must be above 0 and at most 1; to show records more than "
                        "once, use repeat")  # fmt: skip
    if type(repeat) is not int or not 1 <= repeat <= MOST_REPEATS:
        problems.append(
            f"{name}: repeat is {shown(repeat)}, it must be a whole number from 1 to {MOST_REPEATS:,}; to take a part "
            "of the records, use share"
        )
    if "columns" in value and not (value["columns"] is None or isinstance(value["columns"], Mapping)):
        problems.append(f"{name}: columns is {shown(value['columns'])}, it must be {{our name: theirs}}")
    return problems
