"""The configuration of a run: one dataclass, filled from a YAML file and flags of the same names.

    python -m train.plan train/recipes/dolly-v2-3b.yaml --epochs 1

Every value remembers where it came from (default, the file, a flag), and a run prints and records that.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import SettingError, one_line, unknown_name
from train.data.entries import parse_entries
from train.recipe_file import parse, problem, read_recipe, shown

SCHEDULES = ("warmup", "cosine", "linear")
DTYPES = ("auto", "bf16", "fp16", "fp32")
ZERO_STAGES = ("auto", "0", "1", "2", "3")
OFFLOADS = ("auto", "none", "optimizer", "all")
SWITCH = ("auto", "true", "false")
FINAL_FROM = ("last", "best")
#: peft's layer for new rows reads the weight of the embedding from outside of it, where ZeRO 3 has not gathered it.
NO_SPLIT_ADAPTERS = (
    "lora works with zero_stage 0, 1 or 2: ZeRO 3 splits the frozen weights, and peft needs the embedding whole; to "
    "save memory set lora: {r: 16, bits: 4}"
)
#: A year and a bit.
MOST_HOURS = 10_000
MULTI_TURN = ("drop", "last")
#: Most samples of a run: each is decoded at every evaluation.
MOST_SAMPLES = 100
_PACKED = "batches are always packed; python -m train.bench compares them with padded ones: remove this line"
#: Settings of earlier versions -> what to do about them.
REMOVED = {"batching": _PACKED, "padded_batch_size": _PACKED}
#: A number as people write it: `5e-6` and `.5` as well as JSON's.
_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def _option(default: Any, doc: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices})


def _count(default: int, least: int, most: int, doc: str) -> Any:
    """A whole number. Its upper limit is far above what anybody trains with, and below what a mistake costs."""
    return field(default=default, metadata={"doc": doc, "choices": None, "limits": (least, most)})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. The defaults are those of the public dolly-v2 command (databrickslabs/dolly, train_dolly.py).

    Required settings default to "".
    """

    model: str = _option("", "base model: a directory or a hub id (required)")
    model_revision: str = _option("master", "tag or branch of the base model on the hub")
    dataset: str | list = _option(
        "", "records: a file, folder, glob, ms:OWNER/NAME or hf:OWNER/NAME, or a list of these (required)"
    )
    columns: dict = _option(None, "our name -> the column's, for instance {instruction: question, response: answer}")
    output_dir: str = _option("", "directory of the run (required)")
    strict: bool = _option(False, "refuse to train when any record is unusable, instead of dropping it")
    max_length: int = _count(2048, 1, 2**20, "records of this many tokens or more are dropped, as in the public recipe")
    test_size: int = _count(200, 0, 10**7, "records held out for evaluation")
    seed: int = _count(42, 0, 2**32 - 1, "of the split, the order of the records, and the adapters")
    epochs: int = _count(2, 1, 10_000, "passes over the records")
    max_steps: int = _count(0, 0, 10**7, "stop after this many optimizer steps, for trials; 0: all")
    global_batch_size: int = _count(48, 1, 2**16, "records per optimizer step, over all ranks and accumulation steps")
    tokens_per_batch: int = _count(2048, 1, 2**20, "most tokens in one forward pass of one rank")
    learning_rate: float = _option(5e-6, "peak learning rate of AdamW")
    schedule: str = _option("warmup", "warmup: DeepSpeed's WarmupLR, then constant; cosine; linear", SCHEDULES)
    warmup_steps: int = _count(50, 0, 10**7, "optimizer steps until the peak")
    weight_decay: float = _option(0.0, "of AdamW")
    adam_beta1: float = _option(0.9, "of AdamW")
    adam_beta2: float = _option(0.999, "of AdamW")
    adam_epsilon: float = _option(1e-8, "of AdamW")
    gradient_clip: float = _option(1.0, "largest gradient norm; 0 turns clipping off")
    dtype: str = _option("auto", "number type of forward and backward; master weights are float32", DTYPES)
    checkpoint_activations: str = _option(
        "auto",
        "recompute activations in the backward pass (less memory, more time); auto: where they do not fit",
        SWITCH,
    )
    zero_stage: str = _option("auto", "DeepSpeed ZeRO stage; auto: by the memory that is available", ZERO_STAGES)
    offload: str = _option("auto", "what ZeRO keeps in host memory", OFFLOADS)
    lora: dict = _option(None, "train adapters instead of all weights, for instance {r: 16}")
    resume: str = _option(
        "auto", "auto: newest complete checkpoint; no: from the base model; or a checkpoint directory"
    )
    save_every: int = _count(200, 1, 10**9, "optimizer steps between checkpoints")
    keep_checkpoints: int = _count(2, 1, 10**6, "older complete checkpoints are removed")
    eval_every: int = _count(50, 0, 10**9, "optimizer steps between evaluations of the held-out records; 0: never")
    report_to: str = _option("tensorboard", "comma-separated: tensorboard, swanlab, wandb, or none")
    patience: int = _count(0, 0, 10**6, "stop after so many evaluations in a row without a lower loss; 0: never")
    final_from: str = _option("last", "weights of final/: of the last step, or of the best checkpoint", FINAL_FROM)
    max_hours: float = _option(0.0, "end a start with a complete checkpoint before it has run so long; 0: no limit")
    publish: dict = _option(None, "publish the result, for instance {model_id: me/x, revision: v1.0.0}")
    multi_turn: str = _option(
        "drop", "conversations of several questions: drop, or last: take the last pair", MULTI_TURN
    )
    deduplicate: bool = _option(False, "drop records that equal or resemble an earlier one")
    samples: int | list = _option(
        0, "instructions that are answered at every evaluation: a list, or so many of the held-out records"
    )
    sample_tokens: int = _count(64, 1, 2**16, "longest answer to one of the samples, in tokens")
    compare_records: int = _count(50, 0, 10**6, "held-out records that base and result answer in the end; 0: none")
    compare_minutes: float = _option(10.0, "most time for that")

    def problems(self) -> list[str]:
        """Everything that is wrong with the values: for each the key, the value and what is allowed."""
        problems = []

        def require(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                problems.append(f"{name} is {shown(getattr(self, name))}, it must be {allowed}")

        for name in ("model", "dataset", "output_dir"):
            if not getattr(self, name):
                problems.append(f"{name} is missing: set it in the file or with {flag(name)}")
        for key in dataclasses.fields(self):
            if "limits" in key.metadata:
                least, most = key.metadata["limits"]
                value = getattr(self, key.name)
                require(value >= least, key.name, f"at least {least}")
                require(value <= most, key.name, f"at most {most:,}")
        for name in ("gradient_clip", "weight_decay"):
            require(getattr(self, name) >= 0, name, "at least 0")
        if self.lora is not None:
            require(self.zero_stage != "3", "zero_stage", f"0, 1, 2 or auto: {NO_SPLIT_ADAPTERS}")
            require(self.offload != "all", "offload", f"none, optimizer or auto: {NO_SPLIT_ADAPTERS}")
        require(0 <= self.max_hours <= MOST_HOURS, "max_hours", f"at least 0 and at most {MOST_HOURS:,}")
        for name, wanted in (("patience", self.patience > 0), ("final_from", self.final_from == "best")):
            measured = self.eval_every > 0 and self.test_size > 0
            require(measured or not wanted, name, "left out where eval_every or test_size is 0: no loss is measured")
        require(self.learning_rate > 0, "learning_rate", "above 0")
        require(self.adam_epsilon > 0, "adam_epsilon", "above 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        require(
            0 < self.compare_minutes <= 10_000, "compare_minutes", "above 0, at most 10,000 (0 compare_records: none)"
        )
        require(self.tokens_per_batch >= self.max_length - 1, "tokens_per_batch",
                f"at least max_length - 1 = {self.max_length - 1}, or the longest records fit nowhere")  # fmt: skip
        try:
            if self.dataset:
                parse_entries(self.dataset)
        except SettingError as error:
            problems.append(str(error))
        return problems + list(_sample_problems(self.samples))


def _sample_problems(samples: int | list) -> Iterator[str]:
    """What is wrong with the setting `samples`."""
    count = samples if isinstance(samples, int) else len(samples)
    if not 0 <= count <= MOST_SAMPLES:
        yield f"samples is {shown(samples)}, it must be 0 to {MOST_SAMPLES}, or a list of as many instructions"
        return
    for number, sample in enumerate([] if isinstance(samples, int) else samples, 1):
        values = list(sample.values()) if isinstance(sample, dict) else [sample]
        known = not isinstance(sample, dict) or ("instruction" in sample and set(sample) <= {"instruction", "context"})
        if not known or not all(isinstance(value, str) and value.strip() for value in values):
            yield f"entry {number} of samples is {shown(sample)}, it must be text or {{instruction: ..., context: ...}}"


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for each key, where its value came from."""

    config: TrainConfig
    origins: dict[str, str]

    def table(self) -> str:
        """One line per key, for people."""
        width = max(map(len, self.origins))
        values = dataclasses.asdict(self.config)
        return "\n".join(f"{name:<{width}}  {values[name]!r}  ({origin})" for name, origin in self.origins.items())


def flag(name: str) -> str:
    """`output_dir` -> `--output-dir`."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The recipe file and a flag for every key."""
    parser.add_argument("recipe", type=Path, help="YAML file, for instance train/recipes/dolly-v2-3b.yaml")
    group = parser.add_argument_group("settings (each overrides the key of the same name in the file)")
    for key in dataclasses.fields(TrainConfig):
        # No types here: build() reads the text as it reads the file's, so that both give the same errors.
        group.add_argument(flag(key.name), metavar="VALUE", help=f"{key.metadata['doc']} (default: {key.default!r})")


def resolve(options: argparse.Namespace) -> Resolved:
    """The configuration that file and flags give together.

    Raises:
        SettingError: unreadable file, unknown key, wrong type, or values out of range, all in one message.
    """
    values = read_recipe(options.recipe)
    # A path may have bytes that are not UTF-8, which could neither be printed nor written into run.json.
    origins = dict.fromkeys(values, str(options.recipe).encode("utf-8", "backslashreplace").decode("utf-8"))
    for key in dataclasses.fields(TrainConfig):
        text = getattr(options, key.name, None)
        if text is not None:
            values[key.name], origins[key.name] = _parse(key, text), flag(key.name)
    return build(values, origins)


def build(values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Resolved:
    """Check types and ranges of `values` on top of the defaults. Raises SettingError."""
    keys = {key.name: key for key in dataclasses.fields(TrainConfig)}
    problems, typed = [], {}
    for name, value in values.items():
        if name in REMOVED:
            problems.append(f"{name} is no longer a setting: {REMOVED[name]}")
        elif name not in keys:
            word = one_line(ValueError(name), 80)
            problems.append(unknown_name("setting", word, difflib.get_close_matches(word, keys, n=5, cutoff=0.0)))
        else:
            try:
                typed[name] = _typed(keys[name], value)
            except ValueError as error:
                problems.append(f"{name} is {shown(value)}, {error}")
    config = TrainConfig(**typed)
    problems += config.problems()
    if problems:
        raise SettingError("; ".join(problems))
    origins = origins or {}
    return Resolved(config, {name: origins.get(name, "given" if name in typed else "default") for name in keys})


def _parse(key: dataclasses.Field, text: str) -> Any:
    """The value of a flag: text as it stands (a path may have any character), anything else as in the file.

    `dataset` is text, unless it begins with a bracket as a list or a map does.
    """
    if key.type == "str" or not text or (key.name == "dataset" and text[0] not in "[{"):
        return text
    try:
        return parse(text)
    except ValueError as error:
        raise SettingError(f"{flag(key.name)} {shown(text)}: not YAML of a recipe: {one_line(error)}") from None


def _typed(key: dataclasses.Field, value: Any) -> Any:
    """`value` in the type of the key's default; ValueError says what was expected."""
    expected, choices = str(key.type), key.metadata["choices"]
    if found := problem(value):
        raise ValueError(found)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected == "bool" and not isinstance(value, bool):
        raise ValueError("it must be true or false")
    if expected == "int" and not (is_number and isinstance(value, int)):
        raise ValueError("it must be a whole number")
    if expected == "str | list" and not isinstance(value, (str, list, dict)):
        raise ValueError("it must be text, a map with path, or a list of these")
    if expected == "int | list" and not (isinstance(value, list) or (is_number and isinstance(value, int))):
        raise ValueError("it must be a whole number, or a list of instructions")
    if expected == "dict" and not (value is None or isinstance(value, dict)):
        raise ValueError("it must be {key: value, ...}")
    if expected == "float":
        number = float(value) if is_number or (isinstance(value, str) and _DECIMAL.fullmatch(value)) else math.nan
        if not math.isfinite(number):
            raise ValueError("it must be a number")
        return number
    if expected != "str":
        return value
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
    if choices == SWITCH and isinstance(value, bool):
        text = str(value).lower()
    if key.name == "resume" and value is False:
        text = "no"  # as YAML 1.1 read a bare no
    if text is None:
        raise ValueError("it must be text")
    if choices and text not in choices:
        raise ValueError(f"it must be one of {', '.join(choices)}")
    return text
