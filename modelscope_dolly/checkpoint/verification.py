"""Comparing a model's files with its manifest without making the user wait: beside the reading, and only once.

`RememberedDigests` knows files that have been hashed before. A file counts as the same while device, inode, size, and
the times of its last modification and last change (ctime), in nanoseconds, are the same. Programs cannot set the ctime
of a file: whatever writes to it, renames another file to its name, or sets its modification time back, gives it a new
one. Not noticed are bytes that change beneath the file system (a failing disk), what an administrator does to the
clock or the raw device, and, until attributes are fetched again, what another computer writes to a network file system.
`verify="always"` reads every byte.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.files import parse_json, stream_sha256, write_json

#: Files that are remembered, the ones used last.
_MOST_FILES = 4096
_LARGEST = 1 << 20
_VERSION = 1
#: Times have the grain of the kernel's clock (up to 10 ms; 2 s on FAT): a file that was changed so shortly before it
#: was hashed may be changed again with the same times.
_SETTLED_NS = 3_000_000_000
_KEY, _SHA256 = re.compile(r"[0-9]+(:-?[0-9]+){4}"), re.compile(r"[0-9a-f]{64}")


def cache_file() -> Path:
    """Where digests are remembered: in the user's cache directory ($XDG_CACHE_HOME, by default ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "modelscope-dolly" / "verified.json"


class RememberedDigests:
    """SHA-256 of files, by way of a file of the user's own that others cannot write. Thread-safe.

    Whatever is wrong with that file, it is as if it were empty.
    """

    def __init__(self, file: Path | None = None):
        self._file = file or cache_file()
        self._known = _read(self._file)
        self._used: dict[str, str] = {}

    def sha256(self, path: Path, before_each: Callable[[], object]) -> str:
        """As files.stream_sha256 of the file, which is only read where it is not remembered."""
        with open(path, "rb") as file:
            before, begun = os.fstat(file.fileno()), time.time_ns()
            key = _key(before)
            digest = self._known.get(key)
            if digest is None:
                digest = stream_sha256(file, before_each)
                settled = begun - max(before.st_mtime_ns, before.st_ctime_ns) > _SETTLED_NS
                if not settled or key != _key(os.fstat(file.fileno())):
                    return digest
            self._used[key] = digest
        return digest

    def save(self) -> None:
        """Remember what has been hashed. Where another process saves at the same time, the last one wins."""
        if all(key in self._known for key in self._used) or not hasattr(
            os, "geteuid"
        ):  # a ctime is another thing there
            return
        known = _read(self._file)
        for key, digest in self._used.items():
            known.pop(key, None)  # to the end: used last
            known[key] = digest
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._file.parent.stat().st_uid == os.geteuid():  # not root in somebody's home
                entries = dict(list(known.items())[-_MOST_FILES:])
                write_json(self._file, {"version": _VERSION, "sha256": entries}, private=True)
        except OSError:  # no home, a full disk: then it is hashed again
            pass


def _key(status: os.stat_result) -> str:
    numbers = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return ":".join(map(str, numbers))


def _read(file: Path) -> dict[str, str]:
    """What is remembered; nothing, where the file is missing, damaged, not ours, or can be written by others."""
    if not hasattr(os, "geteuid"):
        return {}
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            ours = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not ours or not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                return {}
            value = parse_json(stream.read(_LARGEST), file)
    except (OSError, CheckpointError):
        return {}
    entries = value.get("sha256")
    if value.get("version") != _VERSION or not isinstance(entries, dict):
        return {}
    return {
        key: digest for key, digest in entries.items()
        if isinstance(digest, str) and _KEY.fullmatch(key) and _SHA256.fullmatch(digest)
    }  # fmt: skip


class FilesDiffer(CheckpointError):
    """Files are not those that the manifest lists."""


def raise_problems(problems: list[str], kind: type[CheckpointError] = CheckpointError) -> None:
    """Raises the first three of the problems as one error; returns where there are none."""
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise kind("; ".join(problems[:3]) + more)


class Verification:
    """Files of a directory, compared with its manifest in threads of their own.

    Args:
        directory: of the model.
        names: of the files.
        remember: whether files that have been hashed before are not read again.
    """

    def __init__(self, directory: Path, names: Sequence[str], remember: bool):
        self.directory = directory
        self._digests = RememberedDigests() if remember else None
        self._stopped = threading.Event()
        self._found: list[Future[list[str]]] = []
        if manifest.read(directory) is None or not names:
            return
        threads = ThreadPoolExecutor(min(len(names), os.cpu_count() or 1), "dolly-verification")
        self._found = [threads.submit(manifest.differences, directory, [name], self._digest) for name in names]
        threads.shutdown(wait=False)

    @property
    def compares(self) -> bool:
        """Whether there is anything to compare the files with."""
        return bool(self._found)

    def _digest(self, path: Path) -> str:
        if self._digests is not None:
            return self._digests.sha256(path, self._go_on)
        with open(path, "rb") as file:
            return stream_sha256(file, self._go_on)

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise CancelledError

    def problems(self) -> list[str]:
        """Wait for the end; how files differ from the manifest."""
        found = [message for future in self._found for message in future.result()]
        if self._digests is not None and not found:
            self._digests.save()
        return found

    def stop(self) -> None:
        """Nobody wants to know any more: the threads end before their next block."""
        self._stopped.set()
        for future in self._found:
            future.cancel()

    def finish(self) -> None:
        """Wait for the end. Raises FilesDiffer."""
        raise_problems(self.problems(), FilesDiffer)

    @contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Around the reading of the files. Where they cannot be read, that they differ explains it best: FilesDiffer
        takes the place of another CheckpointError. Any other exception ends the threads."""
        try:
            yield
        except CheckpointError:
            self.finish()
            raise
        except BaseException:
            self.stop()
            raise
