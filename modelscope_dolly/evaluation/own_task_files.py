"""Files of questions of one's own, beside the seven sets of the card; checked before a model is loaded.

A .jsonl file holds one question per line, all of one kind:

    {"prompt": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}     multiple choice
    {"prompt": "Question: Name a planet.\\nAnswer:", "answer": ["Mars", "Venus"]}           generation

`answer` of multiple choice is the index of the correct choice, or its text. A choice is scored behind the prompt and a
space, as lm-eval does, by its log-likelihood (acc) and by that divided by its length (acc_norm). Of generation it is
the text, or the texts, one of which the answer must equal (exact_match), whatever its case, punctuation and spaces;
generation is greedy and ends with the line. Nothing is put around a prompt: it is asked as it stands.

A .yaml file is a task of lm-eval (docs/task_guide.md there).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import CheckpointError, SettingError
from modelscope_dolly.evaluation.published import TASK_NAMES
from modelscope_dolly.files import read_file, read_json_lines

SUFFIXES = (".jsonl", ".yaml", ".yml")
_NAME = re.compile(r"[\w.-]+", re.ASCII)
#: What runs Python in lm-eval's files: a function of a file beside it, a class, or a metric that is downloaded.
_CODE = re.compile(r"!function|^\s*[\"']?(?:class|hf_evaluate)[\"']?\s*:", re.MULTILINE)
_INCLUDE = re.compile(r"^\s*[\"']?include[\"']?\s*:\s*[\"']?(?P<path>[^\"'\n#]+)", re.MULTILINE)


def is_file_name(task: str) -> bool:
    """Whether a task is named by its file."""
    return Path(task).suffix.lower() in SUFFIXES


def own_name(task: str) -> str:
    """What a task of one's own is called in results: the name of its file without the suffix, or its own name.

    Raises:
        SettingError: not a name for a file, or that of a task of the card.
    """
    name = Path(task).stem if is_file_name(task) else task
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise SettingError(f"task {task!r}: {name!r} is no name for results; use letters, digits, _ . and - alone")
    if name in TASK_NAMES and is_file_name(task):
        raise SettingError(f"task {task!r}: {name} is a task of the card; give the file another name")
    return name


def read_own_rows(path: Path) -> list[dict[str, Any]]:
    """The questions of a .jsonl file: of multiple choice with `answer` as an index, of generation with a list of texts.

    Raises:
        SettingError: names the line, what was found, and what was expected.
    """
    first: dict[str, bool] = {}

    def problem(row: dict) -> str | None:
        choice = "choices" in row
        if choice != first.setdefault("choice", choice):
            return "multiple choice and generation are two files: some lines have choices, others not"
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            return "prompt must be text that is not blank"
        return _problem_of_choices(row) if choice else _problem_of_answer(row.get("answer"))

    rows = read_json_lines(path, problem)
    if not rows:
        raise SettingError(f"{path}: has no rows")
    return [_normal(row) for row in rows]


def _problem_of_choices(row: dict) -> str | None:
    choices, answer = row["choices"], row.get("answer")
    texts = isinstance(choices, list) and all(isinstance(text, str) and text.strip() for text in choices)
    if not texts or len(choices) < 2:
        return "choices must be a list of two or more texts, none blank"
    if len(set(choices)) < len(choices):
        return "choices must differ from each other"
    if type(answer) is int and 0 <= answer < len(choices):
        return None
    if isinstance(answer, str) and answer in choices:
        return None
    return f"answer is {answer!r}, expected 0 to {len(choices) - 1} or the text of a choice"[:300]


def _problem_of_answer(answer: Any) -> str | None:
    texts = [answer] if isinstance(answer, str) else answer
    if isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return "answer must be text that is not blank, or a list of such texts"


def _normal(row: dict) -> dict[str, Any]:
    answer = row["answer"]
    if "choices" not in row:
        return {"prompt": row["prompt"], "answer": [answer] if isinstance(answer, str) else answer}
    index = row["choices"].index(answer) if isinstance(answer, str) else answer
    return {"prompt": row["prompt"], "choices": row["choices"], "answer": index}


def check_yaml(path: Path, depth: int = 0) -> None:
    """Refuse a task file that would run code: such a file is a program, and may come from anywhere.

    Raises:
        SettingError: it, or a file that it includes, does; or cannot be read.
    """
    try:
        text = read_file(path).decode("utf-8")
    except CheckpointError as error:
        raise SettingError(str(error)) from None
    except UnicodeDecodeError:
        raise SettingError(f"{path}: must be UTF-8") from None
    if found := _CODE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise SettingError(
            f"{path}:{line}: {found[0].strip()!r} runs Python code, which dolly eval does not do for a file; write the "
            "task without it, or its questions as .jsonl"
        )
    for match in _INCLUDE.finditer(text) if depth < 10 else ():
        included = path.parent / match["path"].strip()
        if included.is_file() and "lm_eval" not in included.resolve().parts:  # its own are installed code already
            check_yaml(included, depth + 1)
