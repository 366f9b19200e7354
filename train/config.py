"""The configuration of a run: one dataclass, filled from a YAML file and flags of the same names.

    python -m train.plan train/recipes/dolly-v2-3b.yaml --epochs 1

Every value remembers where it came from (default, the file, a flag), and a run prints and records that.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modelscope_dolly.errors import SettingError, unknown_name

SCHEDULES = ("warmup", "cosine", "linear")
DTYPES = ("auto", "bf16", "fp16", "fp32")
ZERO_STAGES = ("auto", "0", "1", "2", "3")
OFFLOADS = ("auto", "none", "optimizer", "all")
SWITCH = ("auto", "true", "false")
_PACKED = "batches are always packed; python -m train.bench compares them with padded ones: remove this line"
#: Settings of earlier versions -> what to do about them.
REMOVED = {"batching": _PACKED, "padded_batch_size": _PACKED}


def _option(default: Any, doc: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. The defaults are those of the public dolly-v2 command (databrickslabs/dolly, train_dolly.py).

    Required settings default to "".
    """

    model: str = _option("", "base model: a directory or a hub id (required)")
    model_revision: str = _option("master", "tag or branch of the base model on the hub")
    dataset: str = _option("", "records: a .jsonl, .json or .csv file, ms:OWNER/NAME or hf:OWNER/NAME (required)")
    columns: dict = _option(None, "our name -> the column's, for instance {instruction: question, response: answer}")
    output_dir: str = _option("", "directory of the run (required)")
    strict: bool = _option(False, "refuse to train when any record is unusable, instead of dropping it")
    max_length: int = _option(2048, "records of this many tokens or more are dropped, as in the public recipe")
    test_size: int = _option(200, "records held out for evaluation")
    seed: int = _option(42, "of the split, the order of the records, and the adapters")
    epochs: int = _option(2, "passes over the records")
    max_steps: int = _option(0, "stop after this many optimizer steps, for trials; 0: all")
    global_batch_size: int = _option(48, "records per optimizer step, over all ranks and accumulation steps")
    tokens_per_batch: int = _option(2048, "most tokens in one forward pass of one rank")
    learning_rate: float = _option(5e-6, "peak learning rate of AdamW")
    schedule: str = _option("warmup", "warmup: DeepSpeed's WarmupLR, then constant; cosine; linear", SCHEDULES)
    warmup_steps: int = _option(50, "optimizer steps until the peak")
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
    save_every: int = _option(200, "optimizer steps between checkpoints")
    keep_checkpoints: int = _option(2, "older complete checkpoints are removed")
    eval_every: int = _option(50, "optimizer steps between evaluations of the held-out records; 0: never")
    report_to: str = _option("tensorboard", "comma-separated: tensorboard, swanlab, wandb, or none")
    publish: dict = _option(None, "publish the result, for instance {model_id: me/x, revision: v1.0.0}")

    def problems(self) -> list[str]:
        """Everything that is wrong with the values: for each the key, the value and what is allowed."""
        problems = []

        def require(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                problems.append(f"{name} is {getattr(self, name)!r}, it must be {allowed}")

        for name in ("model", "dataset", "output_dir"):
            if not getattr(self, name):
                problems.append(f"{name} is missing: set it in the file or with {flag(name)}")
        for name in ("max_length", "epochs", "global_batch_size", "tokens_per_batch", "save_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("test_size", "seed", "max_steps", "warmup_steps", "eval_every", "gradient_clip", "weight_decay"):
            require(getattr(self, name) >= 0, name, "at least 0")
        require(self.learning_rate > 0, "learning_rate", "above 0")
        require(self.adam_epsilon > 0, "adam_epsilon", "above 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        require(self.tokens_per_batch >= self.max_length - 1, "tokens_per_batch",
                f"at least max_length - 1 = {self.max_length - 1}, or the longest records fit nowhere")  # fmt: skip
        return problems


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
        # No types here: text is parsed as YAML, as in the file, so that both give the same errors.
        group.add_argument(flag(key.name), metavar="VALUE", help=f"{key.metadata['doc']} (default: {key.default!r})")


def resolve(options: argparse.Namespace) -> Resolved:
    """The configuration that file and flags give together.

    Raises:
        SettingError: unreadable file, unknown key, wrong type, or values out of range, all in one message.
    """
    values, origins = {}, {}
    for name, value in read_recipe(options.recipe).items():
        values[name], origins[name] = value, str(options.recipe)
    for key in dataclasses.fields(TrainConfig):
        text = getattr(options, key.name, None)
        if text is not None:
            values[key.name], origins[key.name] = _parse(flag(key.name), text), flag(key.name)
    return build(values, origins)


def build(values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Resolved:
    """Check types and ranges of `values` on top of the defaults. Raises SettingError."""
    keys = {key.name: key for key in dataclasses.fields(TrainConfig)}
    problems, typed = [], {}
    for name, value in values.items():
        if name in REMOVED:
            problems.append(f"{name} is no longer a setting: {REMOVED[name]}")
        elif name not in keys:
            problems.append(unknown_name("setting", name, difflib.get_close_matches(name, keys, n=5, cutoff=0.0)))
        else:
            try:
                typed[name] = _typed(keys[name], value)
            except ValueError as error:
                problems.append(f"{name} is {value!r}, {error}")
    config = TrainConfig(**typed)
    problems += config.problems()
    if problems:
        raise SettingError("; ".join(problems))
    origins = origins or {}
    return Resolved(config, {name: origins.get(name, "given" if name in typed else "default") for name in keys})


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises SettingError with the line of a mistake."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise SettingError(f"{path}: must hold `key: value` lines, found {type(values).__name__}")
    return values


def _parse(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else text
    except yaml.YAMLError as error:
        raise SettingError(f"{name} {text!r}: not YAML: {' '.join(str(error).split())}") from None


def _typed(key: dataclasses.Field, value: Any) -> Any:
    """`value` in the type of the key's default; ValueError says what was expected."""
    expected, choices = str(key.type), key.metadata["choices"]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected == "bool" and not isinstance(value, bool):
        raise ValueError("it must be true or false")
    if expected == "int" and not (is_number and isinstance(value, int)):
        raise ValueError("it must be a whole number")
    if expected == "dict" and not (value is None or isinstance(value, dict)):
        raise ValueError("it must be {key: value, ...}")
    if expected == "float":
        try:  # YAML 1.1 reads 5e-6 as text
            number = float(value) if is_number or isinstance(value, str) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError("it must be a number")
        return number
    if expected != "str":
        return value
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
    if choices == SWITCH and isinstance(value, bool):
        text = str(value).lower()
    if key.name == "resume" and value is False:
        text = "no"  # YAML 1.1 reads a bare no as false
    if text is None:
        raise ValueError("it must be text")
    if choices and text not in choices:
        raise ValueError(f"it must be one of {', '.join(choices)}")
    return text
