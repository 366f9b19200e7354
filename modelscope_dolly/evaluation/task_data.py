"""The data of the seven tasks: local files, checked row by row, and whether requests are those of the card's time.

A file holds one JSON object per line, in the columns that lm-eval's task files read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation.published import TASK_BY_NAME
from modelscope_dolly.files import file_kind, read_json_lines

DataRow = dict[str, Any]
#: (name of a column, the row) -> what is wrong with its value, or None.
ColumnCheck = Callable[[str, DataRow], str | None]


def _text(name: str, row: DataRow) -> str | None:
    return None if isinstance(row[name], str) else f"{name} must be text, found {type(row[name]).__name__}"


def _label(name: str, row: DataRow, choices: int) -> str | None:
    """The index of the correct choice, as a number or as text."""
    if type(row[name]) not in (int, str) or str(row[name]) not in map(str, range(choices)):
        return f"{name} is {row[name]!r}, expected 0 to {choices - 1}"
    return None


def _choices(name: str, row: DataRow) -> str | None:
    value = row[name]
    lists = [value.get("text"), value.get("label")] if isinstance(value, dict) else [None]
    if not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in lists):
        return "choices must be {text: [...], label: [...]}, two lists of text"
    texts, labels = lists
    if len(texts) != len(labels) or len(texts) < 2:
        return f"choices has {len(texts)} texts and {len(labels)} labels; expected as many of each, two or more"
    if row["answerKey"].lstrip() not in labels:
        return f"answerKey is {row['answerKey']!r}, the labels are {', '.join(labels)}"
    return None


def _sentence(name: str, row: DataRow) -> str | None:
    return _text(name, row) or (None if "_" in row[name] else f"{name} has no _ for the option")


def _answer(name: str, row: DataRow) -> str | None:
    return None if row[name] in ("1", "2") else f"{name} is {row[name]!r}, expected '1' or '2'"


def _endings(name: str, row: DataRow) -> str | None:
    value = row[name]
    whole = isinstance(value, list) and len(value) == 4 and all(isinstance(text, str) for text in value)
    return None if whole else f"{name} must be a list of four texts"


_LABEL2, _LABEL4 = partial(_label, choices=2), partial(_label, choices=4)
#: task -> the columns that are read; they are checked in this order.
_COLUMNS: dict[str, dict[str, ColumnCheck]] = {
    "openbookqa": {"question_stem": _text, "answerKey": _text, "choices": _choices},
    "arc_easy": {"question": _text, "answerKey": _text, "choices": _choices},
    "winogrande": {"sentence": _sentence, "option1": _text, "option2": _text, "answer": _answer},
    "hellaswag": {"activity_label": _text, "ctx_a": _text, "ctx_b": _text, "endings": _endings, "label": _LABEL4},
    "piqa": {"goal": _text, "sol1": _text, "sol2": _text, "label": _LABEL2},
    "boolq": {"passage": _text, "question": _text, "label": _LABEL2},
}
_COLUMNS["arc_challenge"] = _COLUMNS["arc_easy"]


def data_file(directory: Path, task: str) -> Path:
    """The file of a task. Raises SettingError when it is not there."""
    if file_kind(directory) != "directory":
        raise SettingError(f"{directory}: no such directory; --data takes the one that holds {task}.jsonl")
    path = directory / f"{task}.jsonl"
    if file_kind(path) != "file":
        there = ", ".join(sorted(file.name for file in directory.glob("*.jsonl"))) or "no .jsonl file"
        raise SettingError(
            f"{path}: missing; the directory has {there}. Leave {task} out with --tasks, or add the file"
        )
    return path


def read_rows(path: Path, task: str) -> list[DataRow]:
    """Every row, checked before anything is scored; only the columns that lm-eval reads, each of one type.

    Raises:
        SettingError: names file and line, what was found and what was expected.
    """
    columns = _COLUMNS[task]

    def problem(row: DataRow) -> str | None:
        for name, check in columns.items():
            if name not in row:
                return f"column {name} is missing; found {', '.join(sorted(row)) or 'none'}"
            if wrong := check(name, row):
                return wrong
        return None

    rows = [{name: row[name] for name in columns} for row in read_json_lines(path, problem)]
    if not rows:
        raise SettingError(f"{path}: has no rows; the card's {task} has {TASK_BY_NAME[task].size}")
    for row in rows:
        if "choices" in row:
            row["choices"] = {name: row["choices"][name] for name in ("text", "label")}
        if "label" in row:
            row["label"] = int(row["label"])
    return rows


def is_exact(task: str, requests: Sequence[Sequence[tuple[str, str]]], gold: Sequence[int]) -> bool:
    """Whether these are the requests and correct choices of the card's time.

    lm-eval 0.3.0 took a digest over all requests of a task, documents shuffled with seed 42, as JSON
    (tests/test_version_stable.py and lm_eval/evaluator.py there). BoolQ's choices came in the order yes, no.

    Args:
        task: its name.
        requests: of each document, (context, continuation) of each choice.
        gold: index of the correct choice of each document.
    """
    documents = [list(map(list, choices)) for choices in requests]
    if task == "boolq":
        documents = [choices[::-1] for choices in documents]
    random.Random(42).shuffle(documents)
    texts = json.dumps(list(itertools.chain.from_iterable(documents))), json.dumps(list(gold))
    card = TASK_BY_NAME[task]
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts] == [card.requests_sha256, card.gold_sha256]
