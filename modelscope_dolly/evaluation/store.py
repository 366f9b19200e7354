"""Results of single tasks on disk: written atomically, and reused only by a run with exactly the same settings.

    OUTPUT/<model>-<key of the run>/<task>.json            scores, and all that determines them
    OUTPUT/<model>-<key of the run>/<task>.samples.jsonl   one line per document, to compare two models pairwise

Two runs share a directory only if model, files, number types, batch size, limit, template and versions are the same;
data and task version are compared for each task.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation.published import TASK_BY_NAME, TASK_NAMES, standard_error
from modelscope_dolly.files import read_json, write_atomically

FORMAT = 1


@dataclass(frozen=True)
class RunIdentity:
    """What determines the scores of a run besides the data of each task."""

    model: str  # hub id, or the last part of a directory's name
    revision: str | None  # of the hub id; None for a directory
    files_sha256: str  # over weights, configuration and tokenizer
    dtype: str  # of the weights
    softmax_dtype: str  # of the log-probabilities
    device: str  # kind or name; other kernels round differently
    scorer: str  # "shared" (each prefix once) or "hf" (lm-eval's own HFLM)
    batch_size: str  # as asked for: a number or "auto"
    limit: int | None  # first documents of each task; None for all
    template: str  # "none", or "dolly" where the tasks are asked as instructions
    versions: dict[str, str]  # of lm_eval, torch and transformers

    @property
    def directory(self) -> str:
        """Name of the run's directory."""
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^\w.-]+", "--", self.model).strip("-.") or "model"
        return f"{name}-{key}"


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task."""

    task: str
    run: RunIdentity  # what determined the scores, with `data` and `task_version`
    data: str  # sha256 of the local file, or "hub:..." for what lm-eval downloaded
    task_version: str  # lm-eval's
    size: int  # documents scored
    correct: dict[str, int]  # metric -> correct answers; `acc` always, `acc_norm` where lm-eval has it
    exact: bool | None  # whether requests and choices are the card's, by digest; None with a limit or a template
    speed: dict[str, float] = field(default_factory=dict)  # seconds, tokens and padding; not compared
    finished: str = ""  # date and time, UTC

    @property
    def card_correct(self) -> int:
        """Correct answers by the card's metric."""
        return self.correct[TASK_BY_NAME[self.task].metric]

    @property
    def score(self) -> float:
        return self.card_correct / self.size

    @property
    def error(self) -> float | None:
        """Standard error of `score`."""
        return standard_error(self.score, self.size)

    @property
    def obstacles(self) -> list[str]:
        """Why the score must not be compared with the card; empty when it may."""
        reasons = [] if self.run.limit is None else [f"limit {self.run.limit}"]
        if self.run.template != "none":
            reasons.append(f"template {self.run.template}")
        return reasons or ([] if self.exact else [f"{self.task} is not the card's data"])


def write(output: Path, result: TaskResult, samples: list[dict]) -> Path:
    """Store one task; its samples first, so that a stored result always has them."""
    directory = output / result.run.directory
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(directory / f"{result.task}.samples.jsonl", lines)
    path = directory / f"{result.task}.json"
    content = {
        "format": FORMAT, **asdict(result), "metric": TASK_BY_NAME[result.task].metric,
        "scores": {name: count / result.size for name, count in result.correct.items()}, "score": result.score,
        "stderr": result.error, "comparable": not result.obstacles, "not_comparable_because": result.obstacles,
    }  # fmt: skip
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def find(output: Path, run: RunIdentity, task: str, data: str, task_version: str) -> TaskResult | None:
    """The stored result of this run, task and data, or None."""
    path = output / run.directory / f"{task}.json"
    if not path.is_file():
        return None
    stored = read(path)
    same = (stored.run, stored.task, stored.data, stored.task_version) == (run, task, data, task_version)
    return stored if same and (path.parent / f"{task}.samples.jsonl").is_file() else None


def read(path: Path) -> TaskResult:
    """Raises SettingError for a file that `write` did not make."""
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        values = {name: content[name] for name in TaskResult.__dataclass_fields__}
        result = TaskResult(**{**values, "run": RunIdentity(**content["run"])})
        if not 0 <= result.card_correct <= result.size or result.size < 1:
            raise ValueError(f"{result.card_correct} of {result.size} right")
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(
            f"{path}: not a result of dolly eval ({type(error).__name__}: {error}); move it away or change --output"
        ) from None
    return result


def runs(output: Path) -> Iterator[list[TaskResult]]:
    """The results of every run below `output`, in the card's order of tasks."""
    for directory in sorted(path for path in output.iterdir() if path.is_dir()) if output.is_dir() else []:
        paths = [directory / f"{name}.json" for name in TASK_NAMES]
        if results := [read(path) for path in paths if path.is_file()]:
            yield results
