"""Files on their way to a hub: each is checked while it is sent, several are sent at a time, progress is reported."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from modelscope_dolly.errors import CheckpointError

T = TypeVar("T")

#: Seconds between lines about a transfer where there is no terminal.
REPORT_INTERVAL = 20.0


class Stopped(Exception):
    """Another file failed, or the user stopped the program."""


class OutgoingFile:
    """A file to be sent, read in pieces. Its last piece is handed out only if all bytes are those of its sha256.

    Looks like an open file to requests; neither it nor the client holds more than one piece in memory.
    """

    def __init__(self, path: Path, size: int, sha256: str, count: Callable[[int], None], stop: threading.Event):
        self.path, self.size, self.sha256 = path, size, sha256
        self.count, self.stop = count, stop
        self.position, self.digest = 0, hashlib.sha256()
        try:
            self.file = open(path, "rb")  # noqa: SIM115 - closed by the with block around this object
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None

    def __enter__(self) -> OutgoingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return self.size

    def read(self, amount: int = -1) -> bytes:
        """The next piece.

        Raises:
            CheckpointError: the file cannot be read, or is not what was staged.
            Stopped: the transfer was called off.
        """
        if self.stop.is_set():
            raise Stopped
        try:
            piece = self.file.read(1 << 20 if amount < 0 else amount)
        except OSError as error:  # requests would take it for a lost connection
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        self.position += len(piece)
        self.digest.update(piece)
        wrong = self.position > self.size or (not piece and self.position < self.size)
        if wrong or (self.position == self.size and self.digest.hexdigest() != self.sha256):
            raise CheckpointError(f"{self.path}: changed while it was being sent; nothing of it is published")
        self.count(len(piece))
        return piece

    def tell(self) -> int:
        """Bytes read."""
        return self.position


class Progress:
    """Bytes sent: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.sent, self.say = total, 0, say
        self.started = self.reported = time.monotonic()
        self.lock = threading.Lock()
        # disable=None: no bar where there is no terminal.
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="Sending", leave=False, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        """Count bytes as sent; a negative number when a file has to be sent again."""
        with self.lock:
            self.sent += count
            self.bar.update(count)
            if self.bar.disable and time.monotonic() - self.reported > REPORT_INTERVAL:
                self.reported = time.monotonic()
                speed = self.sent / (self.reported - self.started)
                self.say(f"{format_size(self.sent)} of {format_size(self.total)} sent, {format_size(speed)} a second")


def format_size(count: float) -> str:
    """A number of bytes as text, in powers of ten: 9.5 MB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def run_in_threads(job: Callable[[T], None], items: list[T], workers: int, stop: threading.Event) -> None:
    """Call `job` with each item, in threads; raises the first error, after the other threads were told to stop.

    Not a ThreadPoolExecutor: that one waits for its threads when the user presses Ctrl-C, and a thread may wait an hour
    for a dead server.
    """
    waiting, lock, errors = items[::-1], threading.Lock(), []
    ended = threading.Semaphore(0)

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    if not waiting:
                        return
                    item = waiting.pop()
                job(item)
        except BaseException as error:
            if not isinstance(error, Stopped):
                errors.append(error)
            stop.set()
        finally:
            ended.release()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(items)))]
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
