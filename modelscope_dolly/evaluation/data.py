"""The data of the seven tasks: local files, checked row by row, and whether requests are those of the card's time.

A file holds one JSON object per line, in the columns that lm-eval's task files read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation.published import BY_NAME
from modelscope_dolly.files import read_json_lines

Row = dict[str, Any]


def _text(row: Row, *names: str) -> str | None:
    for name in names:
        if name not in row:
            return f"column {name} is missing; found {', '.join(sorted(row)) or 'none'}"
        if not isinstance(row[name], str):
            return f"{name} must be text, found {type(row[name]).__name__}"
    return None


def _label(row: Row, name: str, choices: int) -> str | None:
    """A number from 0, as a number or as text."""
    if name not in row:
        return f"column {name} is missing; found {', '.join(sorted(row)) or 'none'}"
    if type(row[name]) not in (int, str) or str(row[name]) not in map(str, range(choices)):
        return f"{name} is {row[name]!r}, expected 0 to {choices - 1}"
    return None


def _choices(row: Row) -> str | None:
    choices = row.get("choices")
    lists = isinstance(choices, dict) and [choices.get("text"), choices.get("label")]
    if not lists or not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in lists):
        return "choices must be {text: [...], label: [...]}, two lists of text"
    texts, labels = lists
    if len(texts) != len(labels) or len(texts) < 2:
        return f"choices has {len(texts)} texts and {len(labels)} labels; expected as many of each, two or more"
    if row["answerKey"].lstrip() not in labels:
        return f"answerKey is {row['answerKey']!r}, the labels are {', '.join(labels)}"
    return None


def _winogrande(row: Row) -> str | None:
    wrong = _text(row, "sentence", "option1", "option2", "answer")
    if not wrong and "_" not in row["sentence"]:
        return "sentence has no _ for the option"
    if not wrong and row["answer"] not in ("1", "2"):
        return f"answer is {row['answer']!r}, expected '1' or '2'"
    return wrong


def _hellaswag(row: Row) -> str | None:
    wrong = _text(row, "activity_label", "ctx_a", "ctx_b")
    endings = row.get("endings")
    if not wrong and not (isinstance(endings, list) and len(endings) == 4 and all(isinstance(e, str) for e in endings)):
        return "endings must be a list of four texts"
    return wrong or _label(row, "label", 4)


#: task -> its columns, and what is wrong with a row, or None.
_COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[Row], str | None]]] = {
    "openbookqa": (
        ("question_stem", "choices", "answerKey"),
        lambda row: _text(row, "question_stem", "answerKey") or _choices(row),
    ),
    "arc_easy": (
        ("question", "choices", "answerKey"),
        lambda row: _text(row, "question", "answerKey") or _choices(row),
    ),
    "winogrande": (("sentence", "option1", "option2", "answer"), _winogrande),
    "hellaswag": (("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
    "piqa": (
        ("goal", "sol1", "sol2", "label"),
        lambda row: _text(row, "goal", "sol1", "sol2") or _label(row, "label", 2),
    ),
    "boolq": (
        ("passage", "question", "label"),
        lambda row: _text(row, "passage", "question") or _label(row, "label", 2),
    ),
}
_COLUMNS["arc_challenge"] = _COLUMNS["arc_easy"]


def data_file(directory: Path, task: str) -> Path:
    """The file of a task. Raises SettingError when it is not there."""
    if not directory.is_dir():
        raise SettingError(f"{directory}: no such directory; --data takes the one that holds {task}.jsonl")
    path = directory / f"{task}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in directory.glob("*.jsonl"))) or "no .jsonl file"
        raise SettingError(
            f"{path}: missing; the directory has {there}. Leave {task} out with --tasks, or add the file"
        )
    return path


def read_rows(path: Path, task: str) -> list[Row]:
    """Every row, checked before anything is scored; only the columns that lm-eval reads, each of one type.

    Raises:
        SettingError: names file and line, what was found and what was expected.
    """
    columns, check = _COLUMNS[task]
    rows = [_kept(row, columns) for row in read_json_lines(path, check)]
    if not rows:
        raise SettingError(f"{path}: has no rows; the card's {task} has {BY_NAME[task].size}")
    return rows


def _kept(row: Row, columns: tuple[str, ...]) -> Row:
    kept = {name: row[name] for name in columns}
    if "choices" in kept:
        kept["choices"] = {name: row["choices"][name] for name in ("text", "label")}
    if "label" in kept:
        kept["label"] = int(row["label"])
    return kept


def is_exact(name: str, requests: Sequence[Sequence[tuple[str, str]]], gold: Sequence[int]) -> bool:
    """Whether these are the requests and right answers of the card's time.

    lm-eval 0.3.0 took a digest over all requests of a task, documents shuffled with seed 42, as JSON
    (tests/test_version_stable.py and lm_eval/evaluator.py there). BoolQ's choices came in the order yes, no.

    Args:
        name: of the task.
        requests: of each document, (context, continuation) of each choice.
        gold: number of the right choice of each document.
    """
    documents = [list(map(list, asked)) for asked in requests]
    if name == "boolq":
        documents = [asked[::-1] for asked in documents]
    random.Random(42).shuffle(documents)
    asked = json.dumps(list(itertools.chain.from_iterable(documents)))
    answers = json.dumps(list(gold))
    found = [hashlib.sha256(text.encode()).hexdigest() for text in (asked, answers)]
    return found == [BY_NAME[name].requests_sha256, BY_NAME[name].gold_sha256]
