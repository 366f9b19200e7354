"""Crash-safe checkpoints of a run: which are complete, which one to resume from, which to remove.

A checkpoint is a directory `checkpoint-STEP`. The file `complete.json` is written into it last, by one process after
all have saved, and lists every file with its size; a directory without a matching one is ignored. Older ones are
removed only after that.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from modelscope_dolly.errors import DollyError, SettingError, one_line
from modelscope_dolly.files import free_disk, gigabytes, read_json, write_atomically

MARKER = "complete.json"
#: What to do when the disk is too small for a run.
DISK_REMEDY = "free some space, lower keep_checkpoints, or give another output_dir"
_NAME = re.compile(r"checkpoint-(\d+)")
_OF_TORCH_SAVE = re.compile(r"inline_container|PytorchStreamWriter")


@dataclass(frozen=True)
class RunCheckpoint:
    """A complete checkpoint: its directory, optimizer step, number of ranks, and the hashes of its plan."""

    path: Path
    step: int
    world: int
    plan_hash: str
    order_hash: str


def mark_complete(path: Path, world: int, plan_hash: str, order_hash: str) -> None:
    """Declare a saved directory complete. One process calls it, after all have written their files."""
    step = int(_NAME.fullmatch(path.name)[1])
    files = {file.relative_to(path).as_posix(): size for file, size in file_sizes(path)}
    marker = {"step": step, "world": world, "plan_hash": plan_hash, "order_hash": order_hash, "files": files}
    write_atomically(path / MARKER, json.dumps(marker, indent=2) + "\n")


def open_run_checkpoint(path: Path) -> RunCheckpoint:
    """Read the marker and compare the files with it.

    Raises:
        DollyError: the directory is not a complete checkpoint; says what is wrong with it.
    """
    if not _NAME.fullmatch(path.name) or not path.is_dir():
        raise DollyError(f"{path}: not a checkpoint directory (checkpoint-STEP)")
    if not (path / MARKER).exists():
        raise DollyError(f"{path}: incomplete, {MARKER} is missing: the run ended while it was being saved")
    marker = read_json(path / MARKER)
    try:
        for name, size in marker["files"].items():
            file = path / name
            actual = file.stat().st_size if file.is_file() else None
            if actual != size:
                raise DollyError(f"{file}: {'missing' if actual is None else f'{actual} bytes'}, expected {size} bytes")
        return RunCheckpoint(path, marker["step"], marker["world"], marker["plan_hash"], marker["order_hash"])
    except (KeyError, AttributeError, TypeError) as error:
        raise DollyError(f"{path / MARKER}: damaged ({type(error).__name__}: {error})") from None


def run_checkpoints(run: Path) -> list[Path]:
    """Directories named as checkpoints, newest step first, complete or not."""
    paths = [path for path in run.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)


def newest_complete(run: Path) -> tuple[RunCheckpoint | None, list[str]]:
    """The newest complete checkpoint, and why each newer directory was skipped."""
    skipped = []
    for path in run_checkpoints(run):
        try:
            return open_run_checkpoint(path), skipped
        except DollyError as error:
            skipped.append(str(error))
    return None, skipped


def choose_resume(run: Path, resume: str, order_hash: str) -> tuple[RunCheckpoint | None, list[str]]:
    """The checkpoint to resume from, and lines that explain the choice.

    Args:
        run: the run directory.
        resume: "auto", "no", or a checkpoint directory.
        order_hash: of this run's plan; a checkpoint of another order of records is refused.

    Raises:
        DollyError: the named checkpoint is incomplete.
        SettingError: the checkpoint belongs to another plan, the run has newer ones than the one named, or "no" meets
            a directory with checkpoints.
    """
    if resume == "no":
        existing = run_checkpoints(run)
        if existing:
            raise SettingError(
                f"resume is 'no', but {run} holds {len(existing)} checkpoints, the newest {existing[0].name}; give "
                "another output_dir, or remove them"
            )
        return None, ["starting from the base model (resume: no)"]
    if resume == "auto":
        chosen, skipped = newest_complete(run)
        lines = [f"skipped: {reason}" for reason in skipped]
    else:
        chosen, lines = open_run_checkpoint(Path(resume)), []
        newest, _ = newest_complete(run)
        if newest and newest.step > chosen.step:  # the next automatic resume would take that one, from another history
            raise SettingError(
                f"resume is {resume!r}, step {chosen.step}, but {newest.path} is newer; remove the newer checkpoints, "
                "or give another output_dir, which keeps both histories"
            )
    if chosen is None:
        return None, [*lines, "starting from the base model: no complete checkpoint"]
    if chosen.order_hash != order_hash:
        raise SettingError(
            f"{chosen.path}: was made with other records or another order of them (data, seed, epochs, "
            "global_batch_size, max_length or test_size changed); give those settings again, or another output_dir"
        )
    return chosen, [*lines, f"resuming from {chosen.path} at step {chosen.step}"]


def prune(run: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest complete checkpoints, and incomplete ones older than the newest complete one."""
    complete, removed = 0, []
    for path in run_checkpoints(run):
        try:
            open_run_checkpoint(path)
            complete += 1
            if complete <= keep:
                continue
        except DollyError:
            if complete == 0:
                continue  # newer than any complete one: it may be in the middle of a save
        remove(path)
        removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Remove a checkpoint directory, if it exists."""
    # The marker first: should the removal be interrupted, the rest is ignored.
    if (path / MARKER).is_file():
        (path / MARKER).unlink()
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report an error while `path` is written on one line, above all a full disk.

    Raises:
        DollyError: in place of OSError, safetensors' own error, and the RuntimeError of torch.save.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # Another RuntimeError is not about files: one of torch.distributed, for instance, when another process ended.
        if isinstance(error, RuntimeError) and not _OF_TORCH_SAVE.search(str(error)):
            raise
        raise DollyError(
            f"{path} cannot be written ({one_line(error)}); {gigabytes(free_disk(path))} are free there. "
            "Started again, a run resumes from its newest complete checkpoint"
        ) from error


def existing_checkpoint_bytes(run: Path) -> int:
    """Bytes of the checkpoints that a run already has; later ones replace them."""
    return sum(size for path in run_checkpoints(run) for _, size in file_sizes(path))


def file_sizes(directory: Path) -> list[tuple[Path, int]]:
    """Every file below a directory, with its bytes."""
    return [(file, file.stat().st_size) for file in sorted(directory.rglob("*")) if file.is_file()]
