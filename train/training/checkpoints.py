"""Crash-safe checkpoints of a run: which are complete and sound, which to remove.

A checkpoint is a directory `checkpoint-STEP`. The file `complete.json` is written into it last, by one process after
all have saved, and lists every file with its size and SHA-256, and the settings that made it; a directory without a
matching one is ignored. Older ones are removed only after that. Which one a run resumes from: resume_choice.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from modelscope_dolly.errors import DollyError, one_line
from modelscope_dolly.files import file_sha256, free_disk, gigabytes, read_json, write_json

MARKER = "complete.json"
#: What a marker is renamed to when the files are found not to be those that it lists.
REJECTED = "complete.json.rejected"
#: What to do when the disk is too small for a run.
DISK_REMEDY = "free some space, lower keep_checkpoints, or give another output_dir"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
_OF_TORCH_SAVE = re.compile(r"inline_container|PytorchStreamWriter")


@dataclass(frozen=True)
class Origin:
    """What makes a checkpoint: two of the same origin continue each other.

    Attributes:
        plan_hash, order_hash: of the batch plan.
        data_sha256: of the records.
        settings: of the run, by name, with the number type that was chosen.
    """

    plan_hash: str = ""
    order_hash: str = ""
    data_sha256: str | None = None
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunCheckpoint:
    """A complete checkpoint: its directory, optimizer step, number of ranks, origin, and files.

    Attributes:
        files: name -> size and SHA-256; without the latter in checkpoints of earlier versions.
    """

    path: Path
    step: int
    world: int
    origin: Origin
    files: Mapping[str, tuple[int, str | None]] = field(repr=False)

    @property
    def has_digests(self) -> bool:
        return all(digest for _, digest in self.files.values())


def digests(path: Path, part: int = 0, parts: int = 1) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint that was just saved; of several processes each hashes its part of them.

    Args:
        path: the directory.
        part, parts: rank and number of processes. The files are dealt out by size, so that all take about as long.
    """
    files = sorted(file_sizes(path), key=lambda entry: -entry[1])[part::parts]
    with ThreadPoolExecutor() as pool:  # hashlib computes without holding the interpreter's lock
        return dict(zip([_name(path, file) for file, _ in files], pool.map(lambda entry: file_sha256(entry[0]), files),
                        strict=True))  # fmt: skip


def mark_complete(path: Path, world: int, origin: Origin, hashed: Mapping[str, str] | None = None) -> None:
    """Declare a saved directory complete. One process calls it, after all have written their files.

    Args:
        path: the directory.
        world: number of processes.
        origin: of the checkpoint.
        hashed: digests of all files (default: computed here).
    """
    hashed = digests(path) if hashed is None else hashed
    names = [(_name(path, file), size) for file, size in file_sizes(path)]
    marker = {
        "version": 2,
        "step": step_of(path),
        "world": world,
        "plan_hash": origin.plan_hash,
        "order_hash": origin.order_hash,
        "data_sha256": origin.data_sha256,
        "settings": origin.settings,
        "files": {name: {"size": size, "sha256": hashed[name]} for name, size in names},
    }
    write_json(path / MARKER, marker | {"sha256": _marker_digest(marker)})


def open_run_checkpoint(path: Path, verify: bool = False) -> RunCheckpoint:
    """Read the marker and compare the files with it.

    Args:
        path: the directory.
        verify: compare contents too, which reads all of them; otherwise sizes.

    Raises:
        DollyError: the directory is not a complete checkpoint; says what is wrong with it.
    """
    if not _NAME.fullmatch(path.name) or not path.is_dir():
        raise DollyError(f"{path}: not a checkpoint directory (checkpoint-STEP)")
    if not (path / MARKER).exists():
        why = "the run ended while it was being saved"
        if (path / REJECTED).exists():
            why = f"an earlier start of the run found it damaged and renamed it to {REJECTED}"
        raise DollyError(f"{path}: incomplete, {MARKER} is missing: {why}")
    marker = read_json(path / MARKER)
    try:
        found = _from_marker(path, marker)
    except (KeyError, AttributeError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise DollyError(f"{path / MARKER}: damaged ({what})") from None
    for name, (size, _) in found.files.items():
        file = path / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            raise DollyError(f"{file}: {'missing' if actual is None else f'{actual} bytes'}, expected {size} bytes")
    if verify:
        _compare_contents(found)
    return found


def _from_marker(path: Path, marker: dict[str, Any]) -> RunCheckpoint:
    """Raises KeyError, AttributeError, TypeError or ValueError for what mark_complete does not write."""
    earlier = "version" not in marker
    if not earlier:
        digest = marker.pop("sha256")
        if marker["version"] != 2:
            raise ValueError(f"version {marker['version']!r}; this program knows 2: use a newer one")
        if digest != _marker_digest(marker):
            raise ValueError("its content changed")
    files = {}
    for name, entry in marker["files"].items():
        size, digest = (entry, None) if earlier else (entry["size"], entry["sha256"])
        if type(size) is not int or (not earlier and not isinstance(digest, str)):
            raise TypeError(f"entry {name!r}")
        files[name] = size, digest
    step, world, order_hash, settings = marker["step"], marker["world"], marker["order_hash"], marker.get("settings")
    if type(step) is not int or step != step_of(path):
        raise ValueError(f"step {step!r}")
    if type(world) is not int or not isinstance(order_hash, str) or not isinstance(settings, (dict, type(None))):
        raise TypeError(f"world {world!r}, order_hash {order_hash!r}, settings a {type(settings).__name__}")
    origin = Origin(marker["plan_hash"], order_hash, marker.get("data_sha256"), settings)
    return RunCheckpoint(path, step, world, origin, files)


def _compare_contents(checkpoint: RunCheckpoint) -> None:
    """Raise DollyError for the first file whose content is not what the marker lists."""
    files = [(checkpoint.path / name, digest) for name, (_, digest) in checkpoint.files.items() if digest]
    with ThreadPoolExecutor() as pool:
        for damage in pool.map(_damage, files):
            if damage:
                raise DollyError(damage)


def _damage(entry: tuple[Path, str]) -> str | None:
    file, expected = entry
    try:
        found = file_sha256(file)
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    same = found == expected
    return None if same else f"{file}: sha256 {found[:12]}..., expected {expected[:12]}...: its content changed"


def reject(path: Path) -> None:
    """Make a checkpoint that was found damaged an incomplete one, so that it is not kept in place of a sound one."""
    (path / MARKER).rename(path / REJECTED)


def _marker_digest(marker: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()


def step_of(path: Path) -> int:
    """The optimizer step in the name of a checkpoint directory."""
    return int(_NAME.fullmatch(path.name)[1])


def _name(path: Path, file: Path) -> str:
    return file.relative_to(path).as_posix()


def run_checkpoints(run: Path) -> list[Path]:
    """Directories named as checkpoints, newest step first, complete or not."""
    paths = [path for path in run.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(paths, key=step_of, reverse=True)


def newest_complete(run: Path) -> tuple[RunCheckpoint | None, list[str]]:
    """The newest complete checkpoint by the sizes of its files, and why each newer directory was skipped."""
    skipped = []
    for path in run_checkpoints(run):
        try:
            return open_run_checkpoint(path), skipped
        except DollyError as error:
            skipped.append(str(error))
    return None, skipped


def prune(run: Path, keep: int, best: Path | None = None) -> list[Path]:
    """Remove all but `best` and the `keep` newest complete checkpoints, and incomplete ones older than the newest
    complete one."""
    complete, removed = 0, []
    for path in run_checkpoints(run):
        try:
            open_run_checkpoint(path)
            complete += 1
            if complete <= keep or path == best:
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
