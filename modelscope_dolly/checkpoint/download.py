"""From the name of a model to a local directory: a path as it is, a hub id by ModelScope's client.

The only module that touches the client, and only when something is downloaded.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import CheckpointError, SettingError, one_line, shown
from modelscope_dolly.files import file_kind, path_of

#: Files to download: no .py, and no pickles except the weights, which are read without running any code.
DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.md", "LICENSE*"]
#: What is known of a model before its weights are downloaded.
SIDE_FILES = [pattern for pattern in DOWNLOAD_PATTERNS if pattern != "*.safetensors"]
#: Downloaded only where there is no safetensors file: many repositories hold the same weights in both formats.
PICKLED_WEIGHTS = "pytorch_model*.bin"
DEFAULT_REVISION = "master"
#: owner/name, of a model or a data set.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def locate(model: str, revision: str | None = None, patterns: Sequence[str] = DOWNLOAD_PATTERNS) -> Path:
    """The local directory of `model`: itself, or for a hub id a downloaded snapshot of the files that match `patterns`.

    Raises:
        CheckpointError: neither a directory nor a model that can be downloaded.
        SettingError: `model` or `revision` is not a text.
    """
    path = Path(path_of("model", model))
    if revision is not None and not isinstance(revision, str):
        raise SettingError(f"revision is {shown(revision)}, it must be the name of a tag or a branch")
    model = os.fspath(model)
    if not model.strip():
        raise CheckpointError("the name of the model is empty; give a directory or a hub id of the form owner/name")
    kind = file_kind(path)
    if kind == "directory":
        return path
    if kind is not None:
        raise CheckpointError(f"{model}: is a file; give the directory that holds config.json")
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such directory, and not a hub id of the form owner/name either")
    path = _download(model, revision or DEFAULT_REVISION, list(patterns))
    if patterns is DOWNLOAD_PATTERNS and not any(path.glob("*.safetensors")):
        path = _download(model, revision or DEFAULT_REVISION, [*patterns, PICKLED_WEIGHTS])
    return path


def locate_adapter(name: str | Path) -> Path:
    """The local directory of a LoRA adapter: itself, or for owner/name or owner/name@tag a downloaded snapshot.

    Raises:
        CheckpointError, SettingError: as locate.
    """
    path = path_of("adapter", name)
    model, _, revision = path.partition("@")
    hub = file_kind(path) is None and HUB_ID.fullmatch(model)
    return locate(model, revision or None, ["*.json", "*.safetensors"]) if hub else Path(path)


def locate_config(model: str, revision: str | None = None) -> Path:
    """A directory with the config.json of `model`; nothing else is downloaded of a hub id."""
    return locate(model, revision, ["config.json"])


def cache_directory() -> Path:
    """Where ModelScope's client puts downloads."""
    from modelscope.hub.utils.utils import get_cache_dir

    return Path(get_cache_dir())


def snapshot_name(path: Path) -> tuple[str, str] | None:
    """Hub id and revision of a directory in ModelScope's cache; None for any other directory."""
    found = re.search(r"models/([^/]+)--([^/]+)/snapshots/([^/]+)$", path.absolute().as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else None


def repair_hint(path: Path) -> str:
    """The command that downloads a good copy, with the hub id where the path shows it."""
    target = "" if snapshot_name(path) else f" --local_dir {shlex.quote(str(path))}"
    model, revision = snapshot_name(path) or ("OWNER/NAME", "REVISION")
    return f"To repair it: modelscope download --model {model} --revision {revision}{target}"


def _download(model: str, revision: str, patterns: list[str]) -> Path:
    from modelscope.hub.snapshot_download import snapshot_download

    def snapshot(**options: Any) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, **options))

    try:
        return snapshot()
    except Exception as error:  # the client's errors have no common base: requests', its own, ValueError
        try:
            return snapshot(local_files_only=True)  # without a network, an earlier download will do
        except Exception:  # likewise; the message says why the hub failed, not that the cache is empty
            raise CheckpointError(
                f"{model}: no such directory here, and revision {revision!r} cannot be downloaded from the hub "
                f"({type(error).__name__}: {one_line(error, 160)}). Check the name, the revision and the network"
            ) from error
