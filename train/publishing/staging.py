"""From a checkpoint to the directory that is published: only the files of a revision, no second copy of the weights.

Weights are hard links, so the staged directory takes no space; everything else is written anew. What a run leaves
beside them (optimizer states, code, notes) stays behind and is reported.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.weights import weight_files
from modelscope_dolly.checkpoint.writer import write_side_files
from modelscope_dolly.errors import CheckpointError, SettingError, one_line
from modelscope_dolly.files import file_sha256, new_directory
from train.publishing.model_card import write_card
from train.publishing.publish_settings import PublishSettings
from train.publishing.remote_files import FileDigest

#: Names that every file system, URL and git client spells alike.
_PORTABLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
#: What is read from a checkpoint besides its weights.
_SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "LICENSE*")
_CLONE = 0x40049409  # the ioctl FICLONE of linux/fs.h: two files share their blocks until one of them changes


@dataclass(frozen=True)
class StagedRevision:
    """A complete directory, ready to be sent.

    Attributes:
        directory: where it is.
        files: path -> content, the manifest included.
        left_out: what the checkpoint directory holds besides; not published.
        weights_as: hard links, shared blocks, or copies of the checkpoint's files.
    """

    directory: Path
    files: dict[str, FileDigest]
    left_out: list[str]
    weights_as: str


def stage(
    source: str | Path,
    settings: PublishSettings,
    run: Path | None = None,
    evaluation: Path | None = None,
    parent: Path | None = None,
) -> StagedRevision:
    """Make `NAME.staged` of a checkpoint directory NAME, in place of an earlier one.

    Args:
        source: a directory with config.json, tokenizer.json and safetensors files.
        settings: name, revision and licence, for the card.
        run: directory with run.json and metrics.jsonl (default: the parent of `source`, if it has a run.json).
        evaluation: a directory of `dolly eval` results of `source`.
        parent: where to put it (default: beside `source`, where hard links are possible).

    Raises:
        CheckpointError: the checkpoint is damaged or not one, or a link leads out of it.
        DollyError: the staged directory cannot be written.
    """
    source = Path(source).resolve()
    side_files = [path.name for pattern in _SIDE_FILES for path in sorted(source.glob(pattern))]
    for name in side_files:
        resolve_inside(source, name)
    checkpoint = open_checkpoint(source, verify=False)  # its bytes are compared below, in the one pass that hashes them
    weights = weight_names(source, checkpoint.tensors)
    target = (Path(parent).resolve() if parent else source.parent) / f"{source.name}.staged"
    check_replaceable(target)
    if run is None and (source.parent / "run.json").is_file():
        run = source.parent
    with staged_writing(target), new_directory(target, replace=True) as directory:
        weights_as = {link_or_copy(resolve_inside(source, name), directory / name) for name in weights}
        for name in side_files:
            if name == "config.json" or name.startswith("LICENSE"):
                shutil.copyfile(resolve_inside(source, name), directory / name)
        checkpoint.tokenizer.tokenizer.save_pretrained(directory)
        write_side_files(directory, checkpoint.tokenizer)
        evaluated = manifest.model_digest(source, weight_files(source)) if evaluation else None
        write_card(directory, settings.model_id, settings.revision, run, evaluation, settings.license, evaluated)
        _check_names(directory)
        manifest.write(directory)
        compare_with_source(source, directory, weights)
        problems = [finding.detail for finding in check_directory(directory) if finding.status == "problem"]
        if problems:
            raise CheckpointError(f"{source}: not fit to be published: {'; '.join(problems[:3])}")
        staged = {path.name for path in directory.iterdir()}
    left_out = sorted(path.name + "/" * path.is_dir() for path in source.iterdir() if path.name not in staged)
    return StagedRevision(target, list_files(target), left_out, " and ".join(sorted(weights_as)))


def list_files(directory: Path) -> dict[str, FileDigest]:
    """path -> content of what the manifest lists, and of the manifest itself."""
    path, listed = directory / manifest.NAME, manifest.read(directory) or {}
    files = {name: FileDigest(entry["size"], entry["sha256"]) for name, entry in listed.items()}
    return {**files, manifest.NAME: FileDigest(path.stat().st_size, file_sha256(path))}


def weight_names(source: Path, tensors: dict[str, tuple[Path, str]]) -> list[str]:
    """The safetensors files of a checkpoint and their index. Raises CheckpointError for pickled weights."""
    names = sorted({file.name for file, _ in tensors.values()})
    pickled = [name for name in names if not name.endswith(".safetensors")]
    if pickled:
        raise CheckpointError(
            f"{source / pickled[0]}: pickled weights are not published; save them as safetensors first "
            "(transformers: model.save_pretrained)"
        )
    index = "model.safetensors.index.json"
    return [*names, index] if (source / index).exists() else names


def resolve_inside(source: Path, name: str) -> Path:
    """The regular file behind a name, through links as long as they stay inside `source`. Raises CheckpointError."""
    path = source / name
    real = path.resolve()
    if not real.is_relative_to(source):
        raise CheckpointError(f"{path}: a link that leads out of the checkpoint, to {real}; put the file itself there")
    if not real.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if real.exists() else 'missing'}")
    return real


def link_or_copy(file: Path, target: Path) -> str:
    """Put a file under another name, without copying its bytes where that is possible; returns what `target` is."""
    try:
        os.link(file, target)
        return "hard links"
    except OSError:  # another file system, or one that has none, or a file of somebody else
        pass
    try:
        import fcntl

        with open(file, "rb") as original, open(target, "wb") as clone:
            fcntl.ioctl(clone.fileno(), _CLONE, original.fileno())
        return "shared blocks"
    except (OSError, ImportError):
        shutil.copyfile(file, target)
        return "copies"


def compare_with_source(source: Path, directory: Path, weights: list[str]) -> None:
    """Raise CheckpointError if the checkpoint has a manifest and is not what that lists."""
    listed = manifest.read(source)
    if listed is None:
        return
    problems = manifest.differences(source, [name for name in ("config.json", "tokenizer.json") if name in listed])
    staged = manifest.read(directory) or {}
    for name in weights:
        if listed.get(name) != staged[name]:
            problems.append(f"{source / name}: not the bytes that {manifest.NAME} lists: its content changed")
    if problems:
        raise CheckpointError(f"{'; '.join(problems[:3])}. To see all: dolly check {source}")


@contextmanager
def staged_writing(target: Path) -> Iterator[None]:
    """Raises SettingError in place of OSError while `target` is written."""
    try:
        yield
    except OSError as error:
        raise SettingError(f"{target} cannot be written ({one_line(error)}); choose another --staging") from error


def check_replaceable(target: Path) -> None:
    """Refuse to replace a directory that was not staged: its content would be lost."""
    if target.exists() and not (target / manifest.NAME).is_file():
        raise SettingError(f"{target}: is in the way and not an earlier staged directory; move it")


def _check_names(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not _PORTABLE.fullmatch(name):
            raise CheckpointError(
                f"{name!r}: a published file name may have the letters a to z, digits and . _ - only: not every hub "
                "and file system spells others alike; rename it, in model.safetensors.index.json too"
            )
