"""lm-eval: its tasks over our data, its HFLM on our model. The only file that imports it.

The card was made with lm-eval of April 2023, zero-shot, without a prompt template. lm-eval 0.4.13 asks the same, which
`task_data.is_exact` proves for given data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from modelscope_dolly.errors import SettingError, one_line
from modelscope_dolly.evaluation.shared_prefix import Scorer, TokenCounts
from modelscope_dolly.evaluation.task_data import data_file, read_rows
from modelscope_dolly.files import file_sha256
from modelscope_dolly.prompt import DollyTokenizer

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise SettingError(f"dolly eval needs lm-eval ({error}): pip install 'modelscope-dolly[eval]'") from None

#: Task file inside lm_eval/tasks, and the split that the card used.
_TASK_FILES = {
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
}
#: Sequences per forward pass of HFLM on a CPU where the batch size is "auto": its own search fills the memory.
_HF_CPU_BATCH = 8


class LoadedTask(NamedTuple):
    """lm-eval's task, its version, and its data: sha256 of the file, or "hub:" and that of all downloaded rows."""

    task: Any
    data: str
    version: str


@contextmanager
def card_tasks(names: Sequence[str], data: Path | None) -> Iterator[dict[str, LoadedTask]]:
    """lm-eval's tasks by name, over the files in `data`, or over what lm-eval downloads."""
    files = {name: data_file(data, name) for name in names} if data is not None else {}
    rows = {name: read_rows(path, name) for name, path in files.items()}
    with tempfile.TemporaryDirectory(prefix="dolly-eval-") as temporary, _lean():
        for name in names:
            task_file = _task_file(Path(temporary), name, rows.get(name))
            Path(temporary, f"card_{name}.yaml").write_text(json.dumps(task_file), "utf-8")
        manager = TaskManager(include_path=temporary, include_defaults=False)
        tasks = {}
        for name in names:
            try:
                task = manager.load(f"card_{name}")["tasks"][f"card_{name}"]
            except Exception as error:  # of datasets, of the network, of lm-eval
                source = files.get(name, "its data set cannot be had from the hub; give local files with --data")
                raise SettingError(f"{name}: {source} ({type(error).__name__}: {one_line(error, 160)})") from None
            identity = file_sha256(files[name]) if name in files else f"hub:{_rows_sha256(task)}"
            tasks[name] = LoadedTask(task, identity, str(task.VERSION))
        yield tasks


def _task_file(directory: Path, name: str, rows: list[dict] | None) -> dict:
    """lm-eval's own task under another name; JSON is YAML. With `rows`, over a file written to `directory`."""
    file, split = _TASK_FILES[name]
    task = {"include": str(Path(lm_eval.__file__).parent / "tasks" / file), "task": f"card_{name}"}
    if rows is None:
        return task
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = {"data_files": {split: str(directory / f"{name}.jsonl")}, "cache_dir": str(directory / "cache")}
    splits = {f"{other}_split": None for other in ("training", "validation", "test")} | {f"{split}_split": split}
    return {**task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source, **splits}


def _rows_sha256(task: Any) -> str:
    digest = hashlib.sha256()
    for row in task.eval_docs:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _gold(task: Any, doc: dict) -> int:
    """Index of the correct choice; WinoGrande's choices are contexts, and its doc_to_text gives the index instead."""
    text = task.doc_to_text(doc)
    return text if isinstance(text, int) else int(task.doc_to_target(doc))


def requests_and_gold(task: Any) -> tuple[list[list[tuple[str, str]]], list[int]]:
    """(context, continuation) of each choice of each document, and the index of each correct choice."""
    with _lean():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        gold = [_gold(task, doc) for doc in task.eval_docs]
    groups = itertools.groupby(task.instances, key=lambda instance: instance.doc_id)
    return [[instance.args for instance in group] for _, group in groups], gold


class CardLM(HFLM):
    """lm-eval's HFLM on a loaded model; counts tokens in `counts`.

    Args:
        model, tokenizer: transformers'.
        batch_size: sequences per forward pass, or "auto".
        softmax_dtype: of the log-probabilities.
        prompt: where given, each request is asked as an instruction, and the choice is the response.
    """

    def __init__(self, model, tokenizer, batch_size: str, softmax_dtype: torch.dtype, prompt: DollyTokenizer | None):
        if batch_size == "auto" and model.device.type != "cuda":
            batch_size = str(_HF_CPU_BATCH)
        with _lean():
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=64, add_bos_token=False,
                softmax_dtype=softmax_dtype,
            )  # fmt: skip
        self.prompt = prompt
        self.counts = TokenCounts()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.prompt is None:
            return super()._encode_pair(context, continuation)
        return self.prompt.encode(context), self.prompt.encode_text(continuation.lstrip())

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        self._check_lengths(requests)
        self.counts.ask([(context, continuation) for _, context, continuation in requests], self.max_length)
        # HFLM computes a sequence once for all requests that differ in its last token only.
        self.counts.useful += sum(len(tokens) for tokens in {(*c, *x[:-1]) for _, c, x in requests})
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _check_lengths(self, requests) -> None:
        longest = max(len(continuation) for _, _, continuation in requests)
        if longest > self.max_length:
            raise SettingError(
                f"a choice has {longest} tokens, the model's window {self.max_length}; use another model"
            )

    def _model_call(self, inps, *arguments, **keywords):
        self.counts.computed += inps.numel()
        return super()._model_call(inps, *arguments, **keywords)


class SharedPrefixLM(CardLM):
    """Scores all requests of a document in one pass; see shared_prefix.py."""

    def __init__(self, model, tokenizer, batch_size: str, softmax_dtype: torch.dtype, prompt: DollyTokenizer | None):
        super().__init__(model, tokenizer, batch_size, softmax_dtype, prompt)
        rows = None if batch_size == "auto" else int(batch_size)
        self.scorer = Scorer(model, self.max_length, rows, softmax_dtype)
        self.counts = self.scorer.counts
        self._known: dict[str, list[int]] = {}
        self._sizes: list[int] = []

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        self._sizes = [len(list(group)) for _, group in itertools.groupby(requests, key=lambda request: request.doc_id)]
        if self.prompt is None:
            texts = {text for request in requests for text in (request.args[0], "".join(request.args)) if text}
            encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # all CPU cores at once
            self._known = dict(zip(texts, encoded, strict=True))
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_encode(self, string: str, *arguments, **keywords) -> list[int]:
        return list(self._known.get(string) or super().tok_encode(string, *arguments, **keywords))

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        self._check_lengths(requests)
        pairs = iter([(context, continuation) for _, context, continuation in requests])
        documents = [list(itertools.islice(pairs, size)) for size in self._sizes]
        with tqdm(total=len(requests), desc="Scoring", unit="requests", disable=None, leave=False) as bar:
            scores = self.scorer.score(documents, bar.update)
        return list(itertools.chain.from_iterable(scores))


def score(lm: CardLM, task: Any, limit: int | None, plain: bool = False) -> list[dict]:
    """lm-eval's samples of one task in the order of the documents; `gold` is the index of the correct choice.

    With `plain`, each template is compiled as often as lm-eval does by itself, for a comparison of speed.
    """
    with _lean(compile_once=not plain):
        tasks = {"tasks": {task.config.task: task}, "groups": {}, "group_map": {}}
        results = lm_eval.evaluate(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
        samples = sorted(results["samples"][task.config.task], key=lambda sample: sample["doc_id"])
        return [{**sample, "gold": _gold(task, sample["doc"])} for sample in samples]


@contextmanager
def _lean(compile_once: bool = True) -> Iterator[None]:
    """Without lm-eval's progress bars and log lines, which end up in log files too, and with templates compiled once.

    lm-eval compiles the Jinja template of a prompt again for each document: most of the time of building requests.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.utils

    logger, drawn = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    level, bar = logger.level, lm_eval.api.task.tqdm
    templates = lm_eval.utils.env
    compile_once = compile_once and "from_string" not in vars(templates)  # not when nested
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    datasets.disable_progress_bars()
    if compile_once:
        templates.from_string = lru_cache(templates.from_string)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if drawn:
            datasets.enable_progress_bars()
        if compile_once:
            del templates.from_string
