"""Resume from a checkpoint on another number of processes, or on one process without the launcher.

DeepSpeed saves optimizer states in shards, cut for one number of processes. Its own converter joins them into one file
per weight, a "universal checkpoint" (deepspeed/checkpoint/ds_to_universal.py), which any number of processes can load.
The records of each step do not depend on that number (BatchPlan.order_hash), so the run continues with the next step;
only how the records of a step are divided among ranks changes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from modelscope_dolly.errors import DollyError, SettingError, one_line
from modelscope_dolly.files import check_disk, new_directory, remove_leftovers
from train.distributed import is_first_process, world_size
from train.training.checkpoints import DISK_REMEDY, MARKER, RunCheckpoint, file_sizes, writing

SUFFIX = ".universal"
_CONVERTED = re.compile(r"checkpoint-[0-9]+\.universal|\.checkpoint-[0-9]+\.universal\.[0-9]+\.[0-9a-f]{8}\.\w+")
#: What the Trainer reads besides DeepSpeed's files. Random states are left behind: they belong to the old processes.
_TRAINER_FILES = ("trainer_state.json", "scheduler.pt", "scaler.pt")


@dataclass(frozen=True)
class StartingPoint:
    """How the run resumes.

    Attributes:
        path: what the Trainer resumes from; None: from the base model.
        stage: ZeRO stage to train with.
        use_deepspeed: whether DeepSpeed trains.
        convert: the checkpoint to convert into `path` first, if any.
        lines: for people.
    """

    path: Path | None
    stage: int
    use_deepspeed: bool
    convert: RunCheckpoint | None = None
    lines: tuple[str, ...] = ()

    @property
    def deepspeed_settings(self) -> dict[str, Any]:
        """The entries of DeepSpeed's configuration for it."""
        return {"checkpoint": {"load_universal": True}} if self.convert else {}


def starting_point(
    saved: RunCheckpoint | None, world: int, stage: int, use_deepspeed: bool, stage_is_auto: bool = True
) -> StartingPoint:
    """Compare a checkpoint with the processes of this run; nothing is written.

    Args:
        saved: the checkpoint to resume from, if any.
        world: processes of this run.
        stage: ZeRO stage that was chosen for it.
        use_deepspeed: whether DeepSpeed was to train.
        stage_is_auto: the user left the stage open, so it may rise to the checkpoint's, which takes no more memory.

    Raises:
        SettingError: they do not match; names the setting that would.
    """
    if saved is None:
        return StartingPoint(None, stage, use_deepspeed)
    saved_stage = _saved_stage(saved.path)
    if saved_stage is None:
        if use_deepspeed:
            raise SettingError(
                f"{saved.path} was saved by one process without DeepSpeed and cannot be split: resume with one process "
                "and zero_stage 0, or give another output_dir"
            )
        return StartingPoint(saved.path, stage, False)
    lines = []
    if not use_deepspeed:
        lines.append(f"{saved.path} was saved by DeepSpeed, so DeepSpeed is used here too, on one process")
    if (2 if stage == 1 else stage) != saved_stage:  # stages 1 and 2 save the same files
        if not (stage_is_auto and saved_stage > stage):
            needed = "1 or 2" if saved_stage == 2 else str(saved_stage)
            raise SettingError(
                f"{saved.path} was saved with ZeRO {needed} and this run has {stage}: give zero_stage {needed}, or "
                "another output_dir"
            )
        lines.append(f"ZeRO {saved_stage} instead of {stage}, as in {saved.path}")
        stage = saved_stage
    # Without ZeRO every process has saved the same complete states.
    if saved.world == world or saved_stage == 0:
        return StartingPoint(saved.path, stage, True, lines=tuple(lines))
    lines.append(f"{saved.path} was saved by {saved.world} processes, this run has {world}: converting it")
    return StartingPoint(saved.path.with_name(saved.path.name + SUFFIX), stage, True, saved, tuple(lines))


def _saved_stage(checkpoint: Path) -> int | None:
    """ZeRO stage, as the files show it: 0, 2 (for 1 as well), 3; None: not saved by DeepSpeed."""
    states = _states(checkpoint)
    if states is None:
        return None
    if any(states.glob("*zero_pp_rank_*_model_states.pt")):
        return 3
    return 2 if any(states.glob("*_optim_states.pt")) else 0


def _states(checkpoint: Path) -> Path | None:
    """DeepSpeed's directory in a checkpoint, as its file `latest` names it."""
    latest = checkpoint / "latest"
    return checkpoint / latest.read_text().strip() if latest.is_file() else None


def convert_together(start: StartingPoint) -> None:
    """Write the checkpoint that `start.path` names, in one process while the others wait. Every process calls it.

    Raises:
        DollyError: the conversion failed.
    """
    if start.convert is None:
        return
    try:
        if is_first_process():
            convert(start.convert.path, start.path)
    finally:
        if world_size() > 1:
            torch.distributed.barrier()  # also after a failure: the others would wait for half an hour
    if not _is_converted_from(start.path, start.convert.path):
        raise DollyError(f"{start.path} is missing: all processes must see the same output_dir")


def convert(checkpoint: Path, target: Path) -> None:
    """Write `checkpoint` as the universal checkpoint `target`, atomically.

    One that an earlier start has left is replaced: it has no digests, so that nothing would notice if it was damaged.

    Raises:
        DollyError: too little disk, or DeepSpeed's converter failed.
    """
    remove_leftovers(target)
    shutil.rmtree(target, ignore_errors=True)
    states = _states(checkpoint)
    size = sum(size for _, size in file_sizes(states))
    # Twice: the fragments, and the files they are joined into.
    check_disk(target.parent, 2 * size, f"converting {checkpoint}", DISK_REMEDY)
    with writing(target), new_directory(target, replace=True) as growing:
        _run_converter(states, growing / states.name)
        for name in (*_TRAINER_FILES, MARKER):
            if (checkpoint / name).exists():
                shutil.copy2(checkpoint / name, growing / name)


def remove_conversions(run: Path) -> list[Path]:
    """Remove the converted checkpoints that killed starts have left, finished or not; returns them."""
    found = [path for path in run.glob("*checkpoint-*") if _CONVERTED.fullmatch(path.name)]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def _is_converted_from(target: Path, checkpoint: Path) -> bool:
    """Whether `target` was converted from this very checkpoint, not from an older one of the same step."""
    copied, original = target / MARKER, checkpoint / MARKER
    if not copied.is_file():
        return False
    return copied.stat().st_mtime_ns == original.stat().st_mtime_ns and copied.read_bytes() == original.read_bytes()


def _run_converter(states: Path, target: Path) -> None:
    """A process of its own: DeepSpeed's converter forks, which a process that holds a GPU or its peers must not."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(states.resolve()), "--output_folder", str(target.resolve())]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DollyError(f"{states}: DeepSpeed's ds_to_universal failed: {one_line(ValueError(last))}")


class AfterConversion(TrainerCallback):
    """Clean up once every process has loaded a converted checkpoint."""

    def __init__(self, start: StartingPoint):
        self.start = start

    def on_train_begin(self, args, state, control, optimizer=None, **keywords):
        if self.start.convert is None:
            return
        _separate_step_counters(optimizer)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if args.process_index == 0:
            shutil.rmtree(self.start.path, ignore_errors=True)  # as large as a checkpoint, and no longer needed


def _separate_step_counters(optimizer: Any) -> None:
    """Give each weight group a step counter of its own.

    DeepSpeed's loader for stage 3 hands the same tensor to all groups (zero/stage3.py,
    load_hp_checkpoint_state_from_checkpoint_dir_stage3), and torch's AdamW then counts it up once per group.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for values in optimizer.state.values():
        if torch.is_tensor(values.get("step")):
            values["step"] = values["step"].clone()
