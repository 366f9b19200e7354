"""Which checkpoint a run resumes from, and whether that continues the run that saved it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modelscope_dolly.errors import DollyError, SettingError
from train.config import TrainConfig
from train.prepare import PreparedData
from train.recipe_file import shown
from train.training.checkpoints import (
    Origin,
    RunCheckpoint,
    newest_complete,
    open_run_checkpoint,
    run_checkpoints,
)

#: Settings that decide which records each step sees. Others of them may give the same steps, so it is the order of the
#: records that is compared.
OF_THE_ORDER = (
    "dataset", "columns", "strict", "max_length", "test_size", "seed", "epochs", "max_steps", "global_batch_size",
    "multi_turn", "deduplicate",
)  # fmt: skip
#: Settings that change the result of the same steps.
OF_THE_RESULT = (
    "learning_rate", "schedule", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "gradient_clip", "dtype", "lora",
)  # fmt: skip
#: With adapters alone: the frozen weights are read from the base model, not from the checkpoint.
OF_THE_BASE = ("model", "model_revision")
#: Settings that change no more than rounding, or nothing of the weights.
HARMLESS = (
    "tokens_per_batch", "checkpoint_activations", "zero_stage", "offload", "save_every", "keep_checkpoints",
    "eval_every", "report_to", "publish", "patience", "final_from", "max_hours", "samples", "sample_tokens",
    "compare_records", "compare_minutes",
)  # fmt: skip
#: Of this start alone.
_OF_THE_START = ("resume", "output_dir")
assert {*OF_THE_ORDER, *OF_THE_RESULT, *OF_THE_BASE, *HARMLESS, *_OF_THE_START} == {
    key.name for key in dataclasses.fields(TrainConfig)
}, "each setting says what a change of it means on resume"


class ResumeChoice(NamedTuple):
    """Where a run resumes.

    Attributes:
        checkpoint: None: from the base model.
        lines: for people.
        damaged: complete checkpoints whose content changed; checkpoints.reject() is for them.
    """

    checkpoint: RunCheckpoint | None
    lines: list[str]
    damaged: list[Path]


def origin_of(config: TrainConfig, data: PreparedData, dtype: str) -> Origin:
    """What this run's checkpoints come from; `dtype` is the number type that was chosen for it."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OF_THE_START}
    return Origin(data.plan.hash, data.plan.order_hash, data.sha256, settings | {"dtype": dtype})


def choose_resume(run: Path, resume: str, origin: Origin) -> ResumeChoice:
    """The checkpoint to resume from; nothing is written.

    Args:
        run: the run directory.
        resume: "auto", "no", or a checkpoint directory; naming one also accepts settings that change the result.
        origin: of this run; a checkpoint of another one is refused.

    Raises:
        DollyError: the named checkpoint is incomplete or damaged.
        SettingError: the checkpoint belongs to another run, this one has newer ones than the one named, or "no" meets a
            directory with checkpoints.
    """
    if resume == "no":
        existing = run_checkpoints(run)
        if existing:
            raise SettingError(
                f"resume is 'no', but {run} holds {len(existing)} checkpoints, the newest {existing[0].name}; give "
                "another output_dir, or remove them"
            )
        return ResumeChoice(None, ["starting from the base model (resume: no)"], [])
    if resume == "auto":
        chosen, lines, damaged = _newest_sound(run)
    else:
        chosen, lines, damaged = open_run_checkpoint(Path(resume), verify=True), [], []
        newest, _ = newest_complete(run)
        if newest and newest.step > chosen.step:  # the next automatic resume would take that one, from another history
            raise SettingError(
                f"resume is {resume!r}, step {chosen.step}, but {newest.path} is newer; remove the newer checkpoints, "
                "or give another output_dir, which keeps both histories"
            )
    if chosen is None:
        return ResumeChoice(None, [*lines, "starting from the base model: no complete checkpoint"], damaged)
    lines += _compared(chosen, origin, accepted=resume != "auto")
    if not chosen.has_digests:
        lines.append(f"{chosen.path} is of an earlier version, without digests: only sizes of files were compared")
    return ResumeChoice(chosen, [*lines, f"resuming from {chosen.path} at step {chosen.step}"], damaged)


def _newest_sound(run: Path) -> tuple[RunCheckpoint | None, list[str], list[Path]]:
    """The newest checkpoint whose content is what its marker lists, why newer ones were skipped, and the damaged ones.

    Every process of a run reads all files of the newest one: so they come to the same choice without a word.
    """
    lines, damaged = [], []
    for path in run_checkpoints(run):
        complete = False
        try:
            open_run_checkpoint(path)
            complete = True
            return open_run_checkpoint(path, verify=True), lines, damaged
        except DollyError as error:
            lines.append(f"skipped: {error}")
            if complete:
                damaged.append(path)
    return None, lines, damaged


def _compared(saved: RunCheckpoint, now: Origin, accepted: bool) -> list[str]:
    """Lines on the settings that differ from those of a checkpoint. Raises SettingError unless it can be continued."""
    before = saved.origin.settings
    differing = differing_settings(before, now.settings) if before is not None else []
    order = [line for name, line in differing if name in OF_THE_ORDER]
    if saved.origin.order_hash != now.order_hash:
        which = "; ".join(order) or "data, seed, epochs, global_batch_size, max_length or test_size changed"
        raise SettingError(
            f"{saved.path}: was made with other records or another order of them ({which}); give those settings again, "
            "or another output_dir"
        )
    if saved.origin.data_sha256 not in (None, now.data_sha256):
        raise SettingError(
            f"{saved.path}: was made with other records of the same lengths (sha256 {saved.origin.data_sha256}, now "
            f"{now.data_sha256}); give the same records, or another output_dir"
        )
    if before is None:
        return [f"{saved.path} is of an earlier version, without settings: whether they changed is not known"]
    decisive = OF_THE_RESULT + (OF_THE_BASE if now.settings["lora"] is not None else ())
    refused = [line for name, line in differing if name in decisive]
    if refused and not accepted:
        raise SettingError(
            f"{saved.path}: was saved with other settings, which change the result: {'; '.join(refused)}. Give those "
            f"of the checkpoint again; or go on from it with the new ones, --resume {saved.path}; or give another "
            "output_dir"
        )
    lines = [f"changed, and with it the result: {line}" for line in refused]
    return lines + [f"changed since the checkpoint: {line}" for name, line in differing if name not in decisive]


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, what it was and is) for each setting with another value; one that only one of them has is not compared."""
    return [
        (name, f"{name} was {shown(before[name])}, is {shown(value)}")
        for name, value in now.items()
        if name in before and before[name] != value
    ]
