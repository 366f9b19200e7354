"""What the loopback hub holds in memory: repositories, their commits, and the blobs behind them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tests.support.loopback_http import Refusal

LARGE = 1 << 20  # seeded files above this stay on disk
PUBLIC, PRIVATE = 5, 1  # the wire encoding of visibility
EPOCH = 1_700_000_000  # time of every first commit; later ones count up from it


class Commit(NamedTuple):
    id: str
    message: str
    created_at: int
    tree: Mapping[str, tuple[str, int]]  # path -> (sha256, size)


class Repository:
    """Branches and tags are names for commits; a new repository has an empty first commit on master."""

    def __init__(self, repo_id: str, visibility: int = PUBLIC, license: str = "") -> None:
        self.repo_id, self.visibility, self.license = repo_id, visibility, license
        self.owner, self.name = repo_id.split("/")
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, Commit] = {}
        self.tags: dict[str, Commit] = {}
        self.commit("master", "initial commit", {})

    def commit(self, branch: str, message: str, tree: Mapping[str, tuple[str, int]]) -> Commit:
        identity = json.dumps([self.repo_id, list(self.commits), branch, message, sorted(tree.items())])
        commit_id = hashlib.sha1(identity.encode()).hexdigest()
        commit = Commit(commit_id, message, EPOCH + len(self.commits), MappingProxyType(dict(tree)))
        self.commits[commit_id] = self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> Commit:
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return names[revision]
        raise Refusal(404, f"{self.repo_id} has no revision {revision!r}")


class BlobStore:
    """Contents by their SHA-256: bytes, or the path of a large file, which is read when it is asked for."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes | Path] = {}

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._contents

    def add(self, data: bytes) -> tuple[str, int]:
        """Store bytes; returns (sha256, size)."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._contents[sha256] = data
        return sha256, len(data)

    def add_file(self, path: Path) -> tuple[str, int]:
        """Store a file; returns (sha256, size)."""
        size = path.stat().st_size
        if size <= LARGE:
            return self.add(path.read_bytes())
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(LARGE):
                digest.update(chunk)
        self._contents[digest.hexdigest()] = path.absolute()
        return digest.hexdigest(), size

    def read(self, sha256: str, start: int, stop: int) -> bytes:
        """The bytes of a range."""
        content = self._contents[sha256]
        if isinstance(content, bytes):
            return content[start:stop]
        with content.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
