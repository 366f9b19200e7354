"""What a revision is: where it goes, which files it has, how it differs from what a hub holds, and what to commit."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.errors import CheckpointError, SettingError, unknown_name
from modelscope_dolly.files import file_sha256

Files = Mapping[str, tuple[int, str]]  # path -> (bytes, sha256)

VISIBILITIES = {"private": 1, "public": 5}  # the numbers are the wire's
#: Most actions, and most bytes of files inside it, of one commit.
COMMIT_ACTIONS, COMMIT_BYTES = 200, 4 << 20
#: Files that belong to the repository and not to a revision: never stale.
_OF_THE_REPOSITORY = {".gitattributes", ".gitignore"}
#: What readers of a model directory would load or run if it stayed behind.
_MISLEADING = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|py|pkl)$|\.index\.json$|(^|/)adapter_config\.json$")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


@dataclass(frozen=True)
class Destination:
    """Where a revision goes.

    Attributes:
        model_id: owner/name.
        revision: the tag, for instance v1.0.3.
        visibility: private or public, of a repository that is created (None: private); an existing one must have it.
        prune: remove files from the branch that the revision does not have.
        verify_download: at the end, fetch the tag into a clean cache and answer a prompt.
        trust_storage_host: hosts beside the endpoint that may see the token.
        license: of the result, for the card and a new repository, as hubs spell it (mit, apache-2.0).

    Raises:
        SettingError: on construction, for values that a hub would refuse or that would be a mistake.
    """

    model_id: str
    revision: str
    visibility: str | None = None
    prune: bool = False
    verify_download: bool = False
    trust_storage_host: tuple[str, ...] = ()
    license: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model_id, str) or not _ID.fullmatch(self.model_id) or ".." in self.model_id:
            raise SettingError(f"model_id is {self.model_id!r}, it must be OWNER/NAME of letters, digits and . _ -")
        tag = self.revision if isinstance(self.revision, str) else ""  # YAML reads a bare 1.0 as a number
        bad_for_git = ".." in tag or tag.endswith((".", ".lock")) or re.fullmatch(r"[0-9a-f]{40}", tag)
        if not _TAG.fullmatch(tag) or bad_for_git or tag.lower() in ("master", "main", "head"):
            raise SettingError(
                f"revision is {self.revision!r}, it must be a tag that does not move, such as v1.0.3: letters, digits "
                "and . _ + - (not master, main or HEAD)"
            )
        if self.visibility is not None and self.visibility not in [*VISIBILITIES]:
            raise SettingError(f"visibility is {self.visibility!r}, it must be private or public")
        for name in ("prune", "verify_download"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} is {getattr(self, name)!r}, it must be true or false")
        if self.license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", str(self.license)):
            raise SettingError(f"license is {self.license!r}, it must be a short name such as mit or apache-2.0")
        if not all(isinstance(host, str) for host in self.trust_storage_host):
            raise SettingError(f"trust_storage_host is {self.trust_storage_host!r}, it must be names of hosts")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Destination:
        """From the `publish` key of a recipe. Raises SettingError."""
        names = [field.name for field in fields(cls)]
        if "token" in values:
            raise SettingError("publish has a token: a recipe is copied into run.json; set MODELSCOPE_API_TOKEN")
        for name in values:
            if name not in names:
                raise SettingError(unknown_name("key of publish", str(name), names))
        for name in ("model_id", "revision"):
            if name not in values:
                raise SettingError(f"publish has no {name}; it must be {{model_id: OWNER/NAME, revision: v1.0.0}}")
        hosts = values.get("trust_storage_host", ())
        hosts = tuple(hosts) if isinstance(hosts, (list, tuple)) else (hosts,)
        return cls(**{**values, "trust_storage_host": hosts})


@dataclass(frozen=True)
class Difference:
    """A revision on the hub, seen from the files that it should have."""

    missing: list[str]
    other: list[str]
    stale: list[str]

    @property
    def misleading(self) -> list[str]:
        """Stale files that readers would take for part of the model."""
        return [name for name in self.stale if _MISLEADING.search(name)]

    @property
    def wrong(self) -> list[str]:
        """What makes it another revision, in words."""
        return [
            *(f"{name} is missing" for name in self.missing),
            *(f"{name} is another file" for name in self.other),
            *(f"{name} is left from another revision" for name in self.misleading),
        ]


def compare(files: Files, remote: Files) -> Difference:
    """Path, size and sha256 of what should be there with what is there."""
    return Difference(
        missing=sorted(files.keys() - remote.keys()),
        other=sorted(name for name in files.keys() & remote.keys() if files[name] != remote[name]),
        stale=sorted(
            name for name in remote.keys() - files.keys() if PurePosixPath(name).name not in _OF_THE_REPOSITORY
        ),
    )


def is_blob(name: str, size: int) -> bool:
    """Whether the hub stores a file apart from commits (git LFS); its client's rule."""
    from modelscope_hub import constants

    place = PurePosixPath(name)
    if place.name.upper() in constants.UPLOAD_INLINE_METADATA_PATHS:
        return False
    return size > constants.UPLOAD_LFS_FORCE_THRESHOLD_BYTES or place.suffix.lower() in constants.MODEL_LFS_SUFFIX


def ordered(names: Sequence[str]) -> list[str]:
    """The manifest last: until it is there, nobody takes a branch between two commits for complete."""
    return sorted(names, key=lambda name: (name == manifest.NAME, name))


def action_for(directory: Path, name: str, size: int, sha256: str) -> dict:
    """What a commit says about a file. Raises CheckpointError if the file has changed."""
    if is_blob(name, size):
        return {"action": "create", "path": name, "type": "lfs", "size": size, "sha256": sha256, "content": "",
                "encoding": ""}  # fmt: skip
    if (directory / name).stat().st_size != size or file_sha256(directory / name) != sha256:
        raise CheckpointError(f"{directory / name}: changed after it was staged; nothing of it is published")
    content = base64.b64encode((directory / name).read_bytes()).decode()
    return {"action": "create", "path": name, "type": "normal", "size": size, "sha256": "", "content": content,
            "encoding": "base64"}  # fmt: skip


def batches(actions: Sequence[dict]) -> list[list[dict]]:
    """Actions in commits that a hub takes."""
    found: list[list[dict]] = [[]]
    taken = 0
    for action in actions:
        length = len(action.get("content", ""))
        if found[-1] and (len(found[-1]) >= COMMIT_ACTIONS or taken + length > COMMIT_BYTES):
            found.append([])
            taken = 0
        found[-1].append(action)
        taken += length
    return found if found[0] else []
