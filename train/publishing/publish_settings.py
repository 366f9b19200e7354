"""Where a revision goes and how it is published: the flags of train.publish, and the `publish` key of a recipe."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from modelscope_dolly.checkpoint.download import HUB_ID
from modelscope_dolly.errors import SettingError, unknown_name

VISIBILITIES = ("private", "public")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


@dataclass(frozen=True)
class PublishSettings:
    """Where a revision goes, and how.

    Attributes:
        model_id: owner/name.
        revision: the tag, for instance v1.0.3.
        visibility: private or public, of a repository that is created (None: private); an existing one must have it.
        prune: remove files from the branch that the revision does not have.
        verify_download: at the end, download the tag into an empty cache and answer a prompt.
        trust_storage_host: hosts besides the endpoint that may see the token.
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
        if not isinstance(self.model_id, str) or not HUB_ID.fullmatch(self.model_id) or ".." in self.model_id:
            raise SettingError(f"model_id is {self.model_id!r}, it must be OWNER/NAME of letters, digits and . _ -")
        tag = self.revision if isinstance(self.revision, str) else ""  # YAML reads a bare 1.0 as a number
        bad_for_git = ".." in tag or tag.endswith((".", ".lock")) or re.fullmatch(r"[0-9a-f]{40}", tag)
        if not _TAG.fullmatch(tag) or bad_for_git or tag.lower() in ("master", "main", "head"):
            raise SettingError(
                f"revision is {self.revision!r}, it must be a tag that does not move, such as v1.0.3: letters, digits "
                "and . _ + - (not master, main or HEAD)"
            )
        if self.visibility is not None and self.visibility not in VISIBILITIES:
            raise SettingError(f"visibility is {self.visibility!r}, it must be private or public")
        for name in ("prune", "verify_download"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} is {getattr(self, name)!r}, it must be true or false")
        if self.license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", str(self.license)):
            raise SettingError(f"license is {self.license!r}, it must be a short name such as mit or apache-2.0")
        if not all(isinstance(host, str) for host in self.trust_storage_host):
            raise SettingError(f"trust_storage_host is {self.trust_storage_host!r}, it must be names of hosts")

    @classmethod
    def from_recipe(cls, values: Mapping[str, Any]) -> PublishSettings:
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

    def command(self, directory: Path) -> str:
        """The command line that publishes a checkpoint directory with these settings."""
        words = ["python", "-m", "train.publish", str(directory)]
        words += ["--model-id", self.model_id, "--revision", self.revision]
        words += ["--visibility", self.visibility] if self.visibility else []
        words += ["--prune"] * self.prune + ["--verify-download"] * self.verify_download
        words += ["--license", self.license] if self.license else []
        for host in self.trust_storage_host:
            words += ["--trust-storage-host", host]
        return shlex.join(words)
