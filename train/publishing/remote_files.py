"""The files of a revision: how they differ from what a hub holds, and the commits that make them equal."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.files import file_sha256

#: Most actions, and most bytes of files inside it, of one commit.
COMMIT_ACTIONS, COMMIT_BYTES = 200, 4 << 20
#: Files that belong to the repository and not to a revision: never stale.
_OF_THE_REPOSITORY = {".gitattributes", ".gitignore"}
#: What readers of a model directory would load or run if it stayed behind.
_MISLEADING = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|py|pkl)$|\.index\.json$|(^|/)adapter_config\.json$")


class FileDigest(NamedTuple):
    """What identifies the content of a file: its bytes and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


Files = Mapping[str, FileDigest]  # path -> content


@dataclass(frozen=True)
class RevisionDifference:
    """Paths in which a revision on the hub differs from the files that it should have.

    Attributes:
        missing: not on the hub.
        changed: on the hub with other content.
        stale: on the hub only.
    """

    missing: list[str]
    changed: list[str]
    stale: list[str]

    @property
    def to_send(self) -> list[str]:
        """Files that the hub lacks."""
        return [*self.missing, *self.changed]

    @property
    def misleading(self) -> list[str]:
        """Stale files that readers would take for part of the model."""
        return [name for name in self.stale if _MISLEADING.search(name)]

    @property
    def mismatches(self) -> list[str]:
        """What makes it another revision, in words."""
        return [
            *(f"{name} is missing" for name in self.missing),
            *(f"{name} differs" for name in self.changed),
            *(f"{name} is left from another revision" for name in self.misleading),
        ]


def compare(files: Files, remote: Files) -> RevisionDifference:
    """Compare path, size and sha256 of what should be there with what is there."""
    return RevisionDifference(
        missing=sorted(files.keys() - remote.keys()),
        changed=sorted(name for name in files.keys() & remote.keys() if files[name] != remote[name]),
        stale=sorted(
            name for name in remote.keys() - files.keys() if PurePosixPath(name).name not in _OF_THE_REPOSITORY
        ),
    )


def is_blob(name: str, size: int) -> bool:
    """Whether the hub stores a file apart from commits (git LFS); its client's rule."""
    from modelscope_hub import constants

    path = PurePosixPath(name)
    if path.name.upper() in constants.UPLOAD_INLINE_METADATA_PATHS:
        return False
    return size > constants.UPLOAD_LFS_FORCE_THRESHOLD_BYTES or path.suffix.lower() in constants.MODEL_LFS_SUFFIX


def commit_action(directory: Path, name: str, size: int, sha256: str) -> dict:
    """The entry of a file in a commit. Raises CheckpointError if the file has changed."""
    action = {"action": "create", "path": name, "size": size}
    if is_blob(name, size):
        return action | {"type": "lfs", "sha256": sha256, "content": "", "encoding": ""}
    if (directory / name).stat().st_size != size or file_sha256(directory / name) != sha256:
        raise CheckpointError(f"{directory / name}: changed after it was staged; nothing of it is published")
    content = base64.b64encode((directory / name).read_bytes()).decode()
    return action | {"type": "normal", "sha256": "", "content": content, "encoding": "base64"}


def make_commits(directory: Path, files: Files, difference: RevisionDifference, prune: bool) -> list[list[dict]]:
    """The commits, each a list of actions, that send what the hub lacks and with `prune` delete what is stale.

    The manifest comes last: until it is there, nobody takes a branch between two commits for complete.
    """
    actions = [{"action": "delete", "path": name} for name in (difference.stale if prune else ())]
    names = sorted(difference.to_send, key=lambda name: (name == manifest.NAME, name))
    return split_actions(actions + [commit_action(directory, name, *files[name]) for name in names])


def split_actions(actions: Sequence[dict]) -> list[list[dict]]:
    """Actions in commits of a size that a hub accepts."""
    commits: list[list[dict]] = []
    commit_bytes = 0
    for action in actions:
        length = len(action.get("content", ""))
        if not commits or len(commits[-1]) >= COMMIT_ACTIONS or commit_bytes + length > COMMIT_BYTES:
            commits.append([])
            commit_bytes = 0
        commits[-1].append(action)
        commit_bytes += length
    return commits
