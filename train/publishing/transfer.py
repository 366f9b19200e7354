"""Bytes on their way to a hub: who may see the token, a file that is checked while it is sent, and how far it is."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from modelscope_dolly.errors import CheckpointError, PublishError

#: Headers that carry the token.
_SECRET = ("Authorization", "Cookie")
_PORTS = {"http": 80, "https": 443}
#: Seconds between lines about a transfer where there is no terminal.
QUIET = 20.0


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port): what must be the same for a token to be sent along."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme)


def guard(clients: Iterable[Any], trusted: Callable[[str], bool], heard: threading.local) -> None:
    """Make every HTTP session of the hub's clients drop the token on the way to an address that is not trusted.

    The one place all requests pass: uploads to a storage host, and redirects, for which the client itself would send
    its cookies along. The sessions' own retries are turned off here, too: ours look at the hub again first. `heard`
    gets the Retry-After header of this thread's latest answer.
    """
    import requests
    from urllib3.util import Retry

    for client in clients:
        sessions = [value for value in vars(client).values() if isinstance(value, requests.Session)]
        if not sessions:  # rather no publish than one with an open door
            raise PublishError(f"{type(client).__name__} of this modelscope-hub is unknown: install the tested version")
        for session in sessions:
            for adapter in session.adapters.values():
                adapter.max_retries = Retry(0, read=False)
                adapter.send = _guarded(adapter.send, trusted, heard)


def _guarded(send: Callable, trusted: Callable[[str], bool], heard: threading.local) -> Callable:
    def send_guarded(request: Any, *arguments: Any, **options: Any) -> Any:
        if not trusted(request.url):
            for name in _SECRET:
                request.headers.pop(name, None)
        answer = send(request, *arguments, **options)
        heard.retry_after = answer.headers.get("Retry-After")
        return answer

    return send_guarded


class Stopped(Exception):
    """Another file failed, or the user stopped the program."""


class Outgoing:
    """A file to be sent, read in pieces. Its last piece is only given away if all bytes are those of its sha256.

    Looks like an open file to requests; neither it nor the client ever holds more than one piece.
    """

    def __init__(self, path: Path, size: int, sha256: str, count: Callable[[int], None], stop: threading.Event):
        self.path, self.size, self.sha256 = path, size, sha256
        self.count, self.stop = count, stop
        self.place, self.digest = 0, hashlib.sha256()
        try:
            self.file = open(path, "rb")  # noqa: SIM115 - closed by the with block around this object
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None

    def __enter__(self) -> Outgoing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return self.size

    def read(self, amount: int = -1) -> bytes:
        """The next piece.

        Raises:
            CheckpointError: the file cannot be read, or is not what was staged.
            Stopped: nobody wants it any more.
        """
        if self.stop.is_set():
            raise Stopped
        try:
            piece = self.file.read(1 << 20 if amount < 0 else amount)
        except OSError as error:  # requests would take it for a lost connection
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        self.place += len(piece)
        self.digest.update(piece)
        wrong = self.place > self.size or (not piece and self.place < self.size)
        if wrong or (self.place == self.size and self.digest.hexdigest() != self.sha256):
            raise CheckpointError(f"{self.path}: changed while it was being sent; nothing of it is published")
        self.count(len(piece))
        return piece

    def tell(self) -> int:
        """Bytes read."""
        return self.place


class Progress:
    """Bytes sent: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.sent, self.say = total, 0, say
        self.began = self.said = time.monotonic()
        self.lock = threading.Lock()
        options = {"total": total, "unit": "B", "unit_scale": True, "desc": "Sending", "leave": False}
        self.bar = tqdm(**options) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, count: int) -> None:
        """So many bytes more; a negative number when a file has to be sent again."""
        with self.lock:
            self.sent += count
            if self.bar is not None:
                self.bar.update(count)
            elif time.monotonic() - self.said > QUIET:
                self.said = time.monotonic()
                speed = self.sent / (self.said - self.began)
                self.say(f"{size(self.sent)} of {size(self.total)} sent, {size(speed)} a second")


def size(count: float) -> str:
    """Bytes for people: 9.5 MB; powers of ten."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def in_parallel(jobs: list[Callable[[], None]], workers: int, stop: threading.Event) -> None:
    """Run jobs in threads; raises the first error, after the others have been told to stop.

    Not a ThreadPoolExecutor: that one waits for its threads when the user presses Ctrl-C, and a thread may wait an hour
    for a dead server.
    """
    left, lock, errors = list(reversed(jobs)), threading.Lock(), []
    ended = threading.Semaphore(0)

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    job = left.pop() if left else None
                if job is None:
                    return
                job()
        except BaseException as error:
            if not isinstance(error, Stopped):
                errors.append(error)
            stop.set()
        finally:
            ended.release()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            ended.acquire()
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
