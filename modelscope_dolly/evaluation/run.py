"""`dolly eval`: the seven tasks of the dolly-v2 card on a model.

Tasks run one by one, so that each has the batch size that suits it, and its result is stored as soon as it is there.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from modelscope_dolly.errors import HardwareError, SettingError, unknown_name
from modelscope_dolly.evaluation import store
from modelscope_dolly.evaluation.data import is_exact
from modelscope_dolly.evaluation.lm_eval_adapter import (
    CardLM,
    SharedPrefixLM,
    Task,
    card_tasks,
    requests_and_gold,
    score,
)
from modelscope_dolly.evaluation.published import BY_NAME, NAMES
from modelscope_dolly.evaluation.shared_prefix import MODEL_TYPES
from modelscope_dolly.evaluation.store import RunIdentity, TaskResult
from modelscope_dolly.evaluation.subject import Subject, examine, load_model, load_tokenizer
from modelscope_dolly.hardware import DTYPES, dtype_name, parse_dtype
from modelscope_dolly.prompt import DollyTokenizer

SCORERS = ("auto", "shared", "hf")
TEMPLATES = ("none", "dolly")


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see `dolly eval --help`."""

    model: str
    revision: str | None = None
    tasks: Sequence[str] = NAMES
    limit: int | None = None
    data: Path | None = None
    batch_size: str = "auto"
    output: Path = Path("runs/eval")
    device: str | None = None
    dtype: str | None = None
    softmax_dtype: str = "fp32"
    template: str = "none"
    scorer: str = "auto"

    def check(self) -> None:
        """Raises SettingError for the first value that cannot be."""
        check_tasks(self.tasks)
        if self.limit is not None and self.limit < 1:
            raise SettingError(f"--limit is {self.limit}, it must be at least 1")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise SettingError(f"--batch-size is {self.batch_size!r}, it must be auto or a number from 1")
        for name, value, allowed in (
            ("template", self.template, TEMPLATES),
            ("scorer", self.scorer, SCORERS),
            ("softmax dtype", self.softmax_dtype, (*DTYPES, "model")),
        ):
            if value not in allowed:
                raise SettingError(unknown_name(name, value, allowed))
        if self.output.exists() and not self.output.is_dir():
            raise SettingError(f"{self.output}: is a file; --output takes a directory")


def check_tasks(tasks: Iterable[str]) -> None:
    """Raises SettingError for a task that the card has not; names the nearest."""
    for task in tasks:
        if task not in NAMES:
            raise SettingError(unknown_name("task", task, NAMES))


def evaluate(settings: Settings) -> list[TaskResult]:
    """Score the model on each task that is not stored yet, and store it; returns all that were asked for.

    Raises:
        SettingError, CheckpointError, HardwareError: one line that says what to change.
    """
    settings.check()
    with card_tasks(settings.tasks, settings.data) as tasks:
        subject = examine(settings.model, settings.revision, settings.device, settings.dtype)
        run = identify(subject, settings)
        results = {name: store.find(settings.output, run, name, *known) for name, (_, *known) in tasks.items()}
        waiting = [name for name, result in results.items() if result is None]
        if len(waiting) < len(tasks):
            _say(f"{len(tasks) - len(waiting)} of {len(tasks)} tasks are stored in {settings.output / run.directory}")
        lm = open_lm(subject, settings, run.scorer) if waiting else None
        for name in waiting:
            try:
                result, samples = run_task(lm, name, tasks[name], run)
            except KeyboardInterrupt:
                done = sum(result is not None for result in results.values())
                _say(
                    f"\nstopped in {name}; {done} of {len(tasks)} tasks are stored, the same command goes on from there"
                )
                raise
            store.write(settings.output, result, samples)
            results[name] = result
            _say(_line(result))
    return list(results.values())


def identify(subject: Subject, settings: Settings) -> RunIdentity:
    """All that determines the scores, but for the data."""
    shared = subject.config.model_type in MODEL_TYPES
    if settings.scorer == "shared" and not shared:
        raise SettingError(
            f"--scorer shared knows {', '.join(MODEL_TYPES)}, not {subject.config.model_type}; use --scorer hf"
        )
    return RunIdentity(
        model=subject.name,
        revision=subject.revision,
        files_sha256=subject.files_sha256,
        dtype=dtype_name(subject.dtype),
        softmax_dtype=dtype_name(_softmax(settings, subject)),
        device=subject.device_name,
        scorer="hf" if settings.scorer == "hf" or not shared else "shared",
        batch_size=settings.batch_size,
        limit=settings.limit,
        template=settings.template,
        versions={name: version(name) for name in ("lm_eval", "torch", "transformers")},
    )


def _softmax(settings: Settings, subject: Subject) -> torch.dtype:
    return subject.dtype if settings.softmax_dtype == "model" else parse_dtype(settings.softmax_dtype)


def open_lm(subject: Subject, settings: Settings, scorer: str) -> CardLM:
    """Load the model for lm-eval; the tokenizer first, as what is wrong with it shows in a second."""
    tokenizer = load_tokenizer(subject)
    prompt = DollyTokenizer(tokenizer) if settings.template == "dolly" else None
    model = load_model(subject)
    kind = SharedPrefixLM if scorer == "shared" else CardLM
    return kind(model, tokenizer, settings.batch_size, _softmax(settings, subject), prompt)


def run_task(lm: CardLM, name: str, known: Task, run: RunIdentity) -> tuple[TaskResult, list[dict]]:
    """Score one task; returns its result and one sample per document."""
    task, data, task_version = known
    before, began = (lm.asked, lm.useful, lm.computed), time.perf_counter()
    try:
        logged = score(lm, task, run.limit)
    except torch.cuda.OutOfMemoryError:
        raise HardwareError(
            f"{name}: the memory of {lm.device} was full at --batch-size {run.batch_size}; use a smaller number"
        ) from None
    seconds = time.perf_counter() - began
    asked, useful, computed = (now - then for now, then in zip((lm.asked, lm.useful, lm.computed), before, strict=True))
    metrics = [metric for metric in ("acc", "acc_norm") if metric in logged[0]]
    exact = None
    if run.limit is None and run.template == "none":
        exact = is_exact(name, [sample["arguments"] for sample in logged], [sample["gold"] for sample in logged])
    result = TaskResult(
        task=name,
        run=run,
        data=data,
        task_version=task_version,
        size=len(logged),
        correct={metric: round(sum(sample[metric] for sample in logged)) for metric in metrics},
        exact=exact,
        speed={
            "seconds": seconds,
            "requests": sum(len(sample["arguments"]) for sample in logged),
            "tokens_asked": asked,
            "tokens_computed": computed,
            "tokens_per_s": asked / seconds,
            "padding_share": 1 - useful / computed,
        },
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return result, [_sample(sample) for sample in logged]


def _sample(sample: dict) -> dict:
    """One document, with what a paired comparison of two models needs."""
    return {
        **{name: sample[name] for name in ("doc_id", "doc_hash", "gold")},
        "loglikelihoods": [float(value) for value, _ in sample["filtered_resps"]],
        "greedy": [bool(greedy) for _, greedy in sample["filtered_resps"]],
        **{metric: int(sample[metric]) for metric in ("acc", "acc_norm") if metric in sample},
    }


def verify(names: Sequence[str], data: Path | None) -> list[dict]:
    """Whether each task's data give the card's requests: {task, file, documents, exact}; loads no model.

    With `data`, every file whose name begins with that of a task is looked at, `hellaswag_1000.jsonl` for example.
    """
    check_tasks(names)
    findings = []
    for name in names:
        if data is not None and not (data / f"{name}.jsonl").is_file():
            findings.append({"task": name, "file": f"{name}.jsonl", "documents": 0, "exact": False, "note": "missing"})
        else:
            findings.append(_verify(name, data))
        for path in sorted(data.glob(f"{name}_*.jsonl")) if data is not None else []:
            with tempfile.TemporaryDirectory(prefix="dolly-eval-") as directory:
                (Path(directory) / f"{name}.jsonl").symlink_to(path.resolve())
                findings.append({**_verify(name, Path(directory)), "file": path.name})
    return findings


def _verify(name: str, data: Path | None) -> dict:
    with card_tasks([name], data) as tasks:
        requests, gold = requests_and_gold(tasks[name][0])
    exact = is_exact(name, requests, gold)
    size = BY_NAME[name].size
    note = "" if len(requests) == size else f"{len(requests)} documents, the card's set has {size}"
    note = note or ("" if exact else "requests or right answers differ from the card's")
    file = f"{name}.jsonl" if data is not None else "downloaded"
    return {"task": name, "file": file, "documents": len(requests), "exact": exact, "note": note}


def _line(result: TaskResult) -> str:
    speed = result.speed
    note = f"  NOT comparable: {'; '.join(result.obstacles)}" if result.obstacles else ""
    return (
        f"{result.task}: {result.score:.6g} ({result.right} of {result.size}) in {speed['seconds']:.1f} s, "
        f"{speed['tokens_per_s']:,.0f} tokens/s, {100 * speed['padding_share']:.1f} % padding{note}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
