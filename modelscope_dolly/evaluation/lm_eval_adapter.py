"""lm-eval: its tasks over our data, its HFLM on our model. The only file that imports it.

The card was made with lm-eval of April 2023, zero-shot, without a prompt template. lm-eval 0.4.13 asks the same, which
`task_data.is_exact` proves for given data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from modelscope_dolly.errors import SettingError, one_line, unknown_name
from modelscope_dolly.evaluation.own_task_files import check_yaml, is_file_name, own_name, read_own_rows
from modelscope_dolly.evaluation.published import TASK_NAMES
from modelscope_dolly.evaluation.shared_prefix import Scorer, TokenCounts
from modelscope_dolly.evaluation.task_data import data_file, read_rows
from modelscope_dolly.files import file_sha256, path_of
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


@contextmanager
def own_tasks(tasks: Sequence[str]) -> Iterator[dict[str, LoadedTask]]:
    """Tasks that are not of the card, by the names of their results: of a file, or by a name of lm-eval.

    Their templates are Jinja's, in its sandbox: a file of questions cannot reach beyond its own text.

    Raises:
        SettingError: a bad file, a name that lm-eval has not, or data that cannot be had.
    """
    found: dict[str, LoadedTask] = {}
    with tempfile.TemporaryDirectory(prefix="dolly-eval-") as temporary, _sandboxed(), _lean():
        for task in tasks:
            name, path = own_name(task), Path(path_of("task", task))
            if not is_file_name(task):
                loaded, identity = _built_in(task), None
            elif path.suffix.lower() == ".jsonl":
                rows = read_own_rows(path)
                file = Path(temporary) / f"{name}.yaml"
                file.write_text(json.dumps(_own_task_file(Path(temporary), name, rows)), "utf-8")
                loaded, identity = _load(str(file), task), file_sha256(path)
            else:
                check_yaml(path)
                loaded, identity = _load(str(path), task), f"file:{file_sha256(path)}"
            for part, one in loaded.items():
                result = name if len(loaded) == 1 else own_name(part)
                if result in found:
                    raise SettingError(f"--tasks names {result} twice; rename one of the files")
                found[result] = LoadedTask(one, identity or f"hub:{_rows_sha256(one)}", str(one.VERSION))
        yield found


def _built_in(name: str) -> dict[str, Any]:
    """Tasks of lm-eval by the name of one, or of a group; the index of all of them takes seconds."""
    pattern = re.compile(rf"^[\s-]*(?:task|group|tag):[\s-]*[\"']?{re.escape(name)}[\"']?\s*$", re.MULTILINE)
    folder = Path(lm_eval.__file__).parent / "tasks"
    homes = {file.parent for file in folder.rglob("*.yaml") if pattern.search(file.read_text("utf-8", "replace"))}
    homes |= {file.parent for file in folder.rglob("_*.yaml") if file.stem.lstrip("_") == name}
    if not homes:
        raise SettingError(
            f"{unknown_name('task', name, TASK_NAMES)}, a task of lm-eval (lm-eval ls tasks), or a file of questions "
            "ending in .jsonl or .yaml"
        )
    return _load(name, name, sorted(homes))


def _load(spec: str, name: str, folders: Sequence[Path] = ()) -> dict[str, Any]:
    """lm-eval's tasks behind a name or a file."""
    try:
        manager = TaskManager(include_path=list(folders) or None, include_defaults=False)
        tasks = manager.load(spec)["tasks"]
        for task in tasks.values():
            if not len(task.eval_docs):
                raise ValueError("no documents")
        return tasks
    except Exception as error:  # of lm-eval, its YAML, datasets, the network
        where = "its data set cannot be had" if folders else "not a task of lm-eval that can be loaded"
        raise SettingError(f"{name}: {where} ({type(error).__name__}: {one_line(error, 160)})") from None


def _own_task_file(directory: Path, name: str, rows: list[dict]) -> dict:
    """lm-eval's task over the rows of own_task_files.read_own_rows."""
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = {"data_files": {"test": str(directory / f"{name}.jsonl")}, "cache_dir": str(directory / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test",
            "doc_to_text": "{{prompt}}", "doc_to_target": "answer", "metadata": {"version": 1}}  # fmt: skip
    mean = {"aggregation": "mean", "higher_is_better": True}
    if "choices" in rows[0]:
        metrics = [{"metric": metric, **mean} for metric in ("acc", "acc_norm")]
        return {**task, "output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": metrics}
    match = {"metric": "exact_match", **mean, "ignore_case": True, "ignore_punctuation": True}
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": 64}
    # Whatever stands before or after the answer on its line is not counted as a difference.
    strip = [{"name": "line", "filter": [{"function": "regex", "regex_pattern": r"^\s*(.*?)\s*$"},
                                         {"function": "take_first"}]}]  # fmt: skip
    return {**task, "output_type": "generate_until", "generation_kwargs": settings, "metric_list": [match],
            "filter_list": strip}  # fmt: skip


def score_own(lm: CardLM, task: Any, limit: int | None) -> tuple[dict[str, float], dict[str, float | None], list[dict]]:
    """lm-eval's metrics of any task, their standard errors, and its samples in the order of the documents."""
    name = task.config.task
    with _sandboxed(), _lean():
        results = lm_eval.evaluate(
            lm, {"tasks": {name: task}, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=100,
            log_samples=True,
        )  # fmt: skip
    found = {key: value for key, value in results["results"][name].items() if isinstance(value, (int, float))}
    metrics = {key.removesuffix(",none"): float(value) for key, value in found.items()
               if "," in key and "_stderr," not in key}  # fmt: skip
    errors = {key.replace("_stderr,", ",").removesuffix(",none"): float(value) for key, value in found.items()
              if "_stderr," in key}  # fmt: skip
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    kept = ("doc_id", "doc", "target", "filtered_resps", "filter")
    return metrics, errors, [{key: sample[key] for key in kept if key in sample} for sample in samples]


@contextmanager
def _sandboxed() -> Iterator[None]:
    """lm-eval renders templates of task files with all of Python within reach; here in Jinja's sandbox."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    plain = lm_eval.utils.env
    sandbox = SandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
    sandbox.filters.update(plain.filters)
    lm_eval.utils.env = sandbox
    try:
        yield
    finally:
        lm_eval.utils.env = plain


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
