"""One run at a time: a lock file, held from the first look at what it protects to the end of the run.

Three things say whether a lock is held, because none does so everywhere:

- `flock`, which the kernel gives up when a process ends in any way. It is decisive between the processes of one
  machine, and on file systems that carry it to the others (NFS does).
- the holder's process number and start time, for file systems without flock.
- the file's time, which its holder renews every few seconds by the clock of the file server. It is for processes on
  other machines, where a file system keeps flock to itself.

A holder that was suspended and has lost its lock finds another one's name in the file, and stops before it writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from modelscope_dolly.errors import DollyError

#: Seconds between renewals, and without one until a holder on another machine counts as gone.
RENEWED_EVERY, GONE_AFTER = 10.0, 120.0
#: Bytes of the record. Always the same, so that one write replaces it.
_SIZE = 512


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host, process: for people.
        boot, processes: which start of which machine, and which of its process tables: containers have their own.
        born: when the process started, in ticks since the boot: a number may be another process's by now.
        started: when the lock was taken.
        token: of this lock alone.
    """

    host: str
    process: int
    boot: str
    processes: str
    born: int
    started: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        started, process = time.strftime("%Y-%m-%d %H:%M:%S %z"), os.getpid()
        tables = _boot(), _process_table()
        return cls(socket.gethostname()[:64], process, *tables, _born(process), started, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {self.started}"


class FileLock:
    """A lock file, held by this process."""

    def __init__(self, path: Path, descriptor: int, holder: Holder):
        self.path, self.holder = path, holder
        self._descriptor = descriptor
        self._released = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name=path.name, daemon=True)
        self._renewal.start()

    def check(self) -> None:
        """Raise DollyError if another run has taken the directory over."""
        try:
            found = _parsed(self.path.read_bytes())
        except FileNotFoundError:
            raise DollyError(
                f"{self.path} is gone, so another run may be at work here: this one ({self.holder}) stops before it "
                "writes; the same command resumes it"
            ) from None
        except OSError:
            return  # a network file system, perhaps, that does not answer just now
        if found is not None and found.token != self.holder.token:
            raise DollyError(
                f"{self.path}: taken over by {found}, because this run ({self.holder}) had shown no life for "
                f"{GONE_AFTER:.0f} s: it stops before it writes, and leaves the directory to the other"
            )

    def release(self) -> None:
        """Remove the lock, unless it is another's by now."""
        self._released.set()
        self._renewal.join()
        with suppress(OSError):
            if (found := _read(self.path)) and found.token == self.holder.token:
                self.path.unlink()
        os.close(self._descriptor)

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_EVERY):
            with suppress(OSError):
                os.utime(self._descriptor)  # without a time: the file server's


def acquire(path: Path, protected: Path, remedy: str) -> tuple[FileLock, list[str]]:
    """Take the lock, also from a run that is gone. Returns it, and lines for people.

    Args:
        path: the lock file.
        protected: what nobody else may write; named in messages.
        remedy: what to do instead, after "wait for it, end it, or".

    Raises:
        DollyError: a run holds it; names its host and process.
        OSError: it cannot be written.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flocked = _flock(descriptor)
            if _is_still(path, descriptor):  # or its holder removed it meanwhile: that file's lock is nobody's
                before, age = _read(path), _age(path.parent, descriptor)
                if flocked is False or (before and _lives(before, age, flocked)):
                    raise DollyError(f"{protected}: {_refusal(before, age, flocked, remedy)}")
                _write(path, descriptor, holder := Holder.this_process())
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    lines = [f"{path}: left by {before}, which has ended; taken over"] if before else []
    return FileLock(path, descriptor, holder), lines


def _write(path: Path, descriptor: int, holder: Holder) -> None:
    """Write `holder` into the open file, which is removed if it does not take that."""
    try:
        os.pwrite(descriptor, json.dumps(asdict(holder)).encode().ljust(_SIZE - 1) + b"\n", 0)
        os.ftruncate(descriptor, _SIZE)
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _flock(descriptor: int) -> bool | None:
    """Whether the kernel gave this process the lock; None where the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lives(holder: Holder, age: float, flocked: bool | None) -> bool:
    """Whether the one that a lock names still runs, if the kernel does not say that somebody holds it."""
    if holder.boot == _boot():
        if flocked:
            return False  # it was on this machine, where the kernel would know
        if holder.processes == _process_table() and holder.born:
            return holder.born == _born(holder.process)
    return age < GONE_AFTER


def _refusal(holder: Holder | None, age: float, flocked: bool | None, remedy: str) -> str:
    by = holder or "a process that has not written its name yet"
    wait = ""
    if flocked is not False:
        wait = f"; if that machine is gone, start again in {max(1, round(GONE_AFTER - age))} s"
    seen = f"last seen {max(0, round(age))} s ago"
    return f"another run is at work here: {by}, {seen}; wait for it, end it, or {remedy}{wait}"


def _read(path: Path) -> Holder | None:
    """Who a lock names; None for no file, and for what no run has written."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


def _parsed(record: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(record[:_SIZE]))
    except (ValueError, TypeError):
        return None


def _age(folder: Path, descriptor: int) -> float:
    """Seconds since an open lock was renewed, by the clock of the file server: those of machines differ."""
    with tempfile.TemporaryFile(dir=folder) as now:
        os.utime(now.fileno())
        return os.fstat(now.fileno()).st_mtime - os.fstat(descriptor).st_mtime


def _boot() -> str:
    """What tells one start of one machine from all others; its containers share it, as they share its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _process_table() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _born(process: int) -> int:
    """When a process started, in ticks since the boot (proc(5), field 22 of stat); 0 where there is none."""
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
