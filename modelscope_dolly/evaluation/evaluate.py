"""`dolly eval`: the seven tasks of the dolly-v2 card on a model, and tasks of one's own.

Tasks run one by one, so that each has the batch size that suits it, and its result is stored as soon as it is there.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from modelscope_dolly.errors import HardwareError, SettingError, shown, unknown_name
from modelscope_dolly.evaluation import own_tasks as own_store
from modelscope_dolly.evaluation import store
from modelscope_dolly.evaluation.lm_eval_adapter import (
    CardLM,
    LoadedTask,
    SharedPrefixLM,
    card_tasks,
    own_tasks,
    requests_and_gold,
    score,
    score_own,
)
from modelscope_dolly.evaluation.model_under_test import ModelUnderTest, find_model, load_network, load_tokenizer
from modelscope_dolly.evaluation.own_task_files import own_name
from modelscope_dolly.evaluation.own_tasks import OwnTaskResult
from modelscope_dolly.evaluation.published import TASK_BY_NAME, TASK_NAMES
from modelscope_dolly.evaluation.shared_prefix import MODEL_TYPES
from modelscope_dolly.evaluation.store import RunIdentity, TaskResult
from modelscope_dolly.evaluation.task_data import is_exact
from modelscope_dolly.files import file_kind
from modelscope_dolly.hardware import DTYPES, dtype_name, parse_dtype
from modelscope_dolly.prompt import DollyTokenizer

SCORERS = ("auto", "shared", "hf")
TEMPLATES = ("none", "dolly")


@dataclass(frozen=True)
class EvalSettings:
    """What the user asked for; see `dolly eval --help`."""

    model: str
    revision: str | None = None
    tasks: Sequence[str] = TASK_NAMES
    own: Sequence[str] = ()
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
        if self.tasks or not self.own:
            check_tasks(self.tasks)
        for task in self.own:
            own_name(task)
        if self.limit is not None and self.limit < 1:
            raise SettingError(f"--limit is {shown(self.limit)}, it must be at least 1")
        if self.batch_size != "auto" and not re.fullmatch(r"[1-9][0-9]{0,8}", self.batch_size):
            raise SettingError(f"--batch-size is {shown(self.batch_size)}, it must be auto or a number from 1")
        for name, value, allowed in (
            ("template", self.template, TEMPLATES),
            ("scorer", self.scorer, SCORERS),
            ("softmax dtype", self.softmax_dtype, (*DTYPES, "model")),
        ):
            if value not in allowed:
                raise SettingError(unknown_name(name, value, allowed))
        if file_kind(self.output) not in (None, "directory"):
            raise SettingError(f"{self.output}: is a file; --output takes a directory")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises SettingError for a task that the card has not, naming the nearest, and for no task at all."""
    if not tasks:
        raise SettingError(f"--tasks names no task; allowed: {', '.join(TASK_NAMES)}")
    for task in tasks:
        if task not in TASK_NAMES:
            raise SettingError(unknown_name("task", task, TASK_NAMES))


def evaluate(settings: EvalSettings) -> list[TaskResult]:
    """Score the model on each task that is not stored yet, and store it; returns the results of all tasks.

    Raises:
        SettingError, CheckpointError, HardwareError: one line that says what to change.
    """
    settings.check()
    with card_tasks(settings.tasks, settings.data) as tasks:
        model = find_model(settings.model, settings.revision, settings.device, settings.dtype)
        run = identify(model, settings)
        results = {
            name: store.find(settings.output, run, name, loaded.data, loaded.version) for name, loaded in tasks.items()
        }
        missing = [name for name, result in results.items() if result is None]
        if len(missing) < len(tasks):
            _log(f"{len(tasks) - len(missing)} of {len(tasks)} tasks are stored in {settings.output / run.directory}")
        lm = open_lm(model, settings, run.scorer) if missing else None
        for name in missing:
            try:
                result, samples = run_task(lm, name, tasks[name], run)
            except KeyboardInterrupt:
                done = sum(result is not None for result in results.values())
                _log(f"\nstopped in {name}; {done} of {len(tasks)} tasks are stored, the same command resumes there")
                raise
            store.write(settings.output, result, samples)
            results[name] = result
            _log(_summary(result))
    return list(results.values())


def evaluate_own(settings: EvalSettings) -> list[OwnTaskResult]:
    """Score the model on each of `settings.own` that is not stored yet, and store it; returns all of them.

    By lm-eval's own scorer, which knows every kind of task.

    Raises:
        SettingError, CheckpointError, HardwareError: one line that says what to change.
    """
    settings.check()
    settings = replace(settings, scorer="hf")
    with own_tasks(settings.own) as tasks:
        generated = [name for name, loaded in tasks.items() if loaded.task.OUTPUT_TYPE != "multiple_choice"]
        if generated and settings.template != "none":
            raise SettingError(f"--template {settings.template} is for multiple choice alone, not for {generated[0]}")
        model = find_model(settings.model, settings.revision, settings.device, settings.dtype)
        run = identify(model, settings)
        found = {name: own_store.find(settings.output, run, name, loaded.data, loaded.version)
                 for name, loaded in tasks.items()}  # fmt: skip
        missing = [name for name, result in found.items() if result is None]
        lm = open_lm(model, settings, run.scorer) if missing else None
        for name in missing:
            loaded = tasks[name]
            try:
                metrics, errors, samples = score_own(lm, loaded.task, run.limit)
            except torch.cuda.OutOfMemoryError:
                raise HardwareError(
                    f"{name}: the memory of {lm.device} was full at --batch-size {run.batch_size}; use a smaller number"
                ) from None
            size = len({sample["doc_id"] for sample in samples})
            finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
            result = OwnTaskResult(name, run, loaded.data, loaded.version, size, metrics, errors, finished)
            own_store.write(settings.output, result, samples)
            found[name] = result
            _log(
                f"{name}: {', '.join(f'{metric} {value:.6g}' for metric, value in metrics.items())} ({size} documents)"
            )
    return [result for result in found.values() if result is not None]


def identify(model: ModelUnderTest, settings: EvalSettings) -> RunIdentity:
    """All that determines the scores, except for the data."""
    shared = model.config.model_type in MODEL_TYPES
    if settings.scorer == "shared" and not shared:
        raise SettingError(
            f"--scorer shared supports {', '.join(MODEL_TYPES)}, not {model.config.model_type}; use --scorer hf"
        )
    return RunIdentity(
        model=model.name, revision=model.revision, files_sha256=model.files_sha256, dtype=dtype_name(model.dtype),
        softmax_dtype=dtype_name(_softmax_dtype(settings, model)), device=model.device_name,
        scorer="hf" if settings.scorer == "hf" or not shared else "shared", batch_size=settings.batch_size,
        limit=settings.limit, template=settings.template,
        versions={name: version(name) for name in ("lm_eval", "torch", "transformers")},
    )  # fmt: skip


def _softmax_dtype(settings: EvalSettings, model: ModelUnderTest) -> torch.dtype:
    return model.dtype if settings.softmax_dtype == "model" else parse_dtype(settings.softmax_dtype)


def open_lm(model: ModelUnderTest, settings: EvalSettings, scorer: str) -> CardLM:
    """Load the model for lm-eval; the tokenizer first, as what is wrong with it shows in a second."""
    tokenizer = load_tokenizer(model)
    prompt = DollyTokenizer(tokenizer) if settings.template == "dolly" else None
    network = load_network(model)
    lm_class = SharedPrefixLM if scorer == "shared" else CardLM
    return lm_class(network, tokenizer, settings.batch_size, _softmax_dtype(settings, model), prompt)


def run_task(lm: CardLM, name: str, loaded: LoadedTask, run: RunIdentity) -> tuple[TaskResult, list[dict]]:
    """Score one task; returns its result and one sample per document."""
    lm.counts.reset()
    start = time.perf_counter()
    try:
        samples = score(lm, loaded.task, run.limit)
    except torch.cuda.OutOfMemoryError:
        raise HardwareError(
            f"{name}: the memory of {lm.device} was full at --batch-size {run.batch_size}; use a smaller number"
        ) from None
    seconds = time.perf_counter() - start
    metrics = [metric for metric in ("acc", "acc_norm") if metric in samples[0]]
    exact = None
    if run.limit is None and run.template == "none":
        exact = is_exact(name, [sample["arguments"] for sample in samples], [sample["gold"] for sample in samples])
    result = TaskResult(
        task=name, run=run, data=loaded.data, task_version=loaded.version, size=len(samples),
        correct={metric: round(sum(sample[metric] for sample in samples)) for metric in metrics}, exact=exact,
        speed=lm.counts.speed(seconds), finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip
    return result, [_compact(sample, metrics) for sample in samples]


def _compact(sample: dict, metrics: list[str]) -> dict:
    """What a paired comparison of two models needs of one document."""
    return {
        **{name: sample[name] for name in ("doc_id", "doc_hash", "gold")},
        "loglikelihoods": [float(value) for value, _ in sample["filtered_resps"]],
        "greedy": [bool(greedy) for _, greedy in sample["filtered_resps"]],
        **{metric: int(sample[metric]) for metric in metrics},
    }


def verify(tasks: Sequence[str], data: Path | None) -> list[dict]:
    """Whether each task's data give the card's requests: {task, file, documents, exact, note}; loads no model.

    With `data`, every file whose name begins with that of a task is looked at, `hellaswag_1000.jsonl` for example.
    """
    check_tasks(tasks)
    findings = []
    for name in tasks:
        if data is not None and file_kind(data / f"{name}.jsonl") != "file":
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
        requests, gold = requests_and_gold(tasks[name].task)
    exact, note = is_exact(name, requests, gold), ""
    if len(requests) != TASK_BY_NAME[name].size:
        note = f"{len(requests)} documents, the card's set has {TASK_BY_NAME[name].size}"
    elif not exact:
        note = "requests or right answers differ from the card's"
    file = f"{name}.jsonl" if data is not None else "downloaded"
    return {"task": name, "file": file, "documents": len(requests), "exact": exact, "note": note}


def _summary(result: TaskResult) -> str:
    speed = result.speed
    note = f"  NOT comparable: {'; '.join(result.obstacles)}" if result.obstacles else ""
    return (
        f"{result.task}: {result.score:.6g} ({result.card_correct} of {result.size}) in {speed['seconds']:.1f} s, "
        f"{speed['tokens_per_s']:,.0f} tokens/s, {100 * speed['padding_share']:.1f} % padding{note}"
    )


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
