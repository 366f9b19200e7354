"""Files: crash-safe writing, JSON, digests, and disk space. Whatever is written is complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from modelscope_dolly.errors import CheckpointError, HardwareError, SettingError, one_line, shown

#: Bytes of the largest JSON file that is read: parsed, it takes up to 30 times as much memory. The largest of a real
#: dolly-v2, tokenizer.json, has 2 MB.
LARGEST_JSON = 1 << 24
#: Characters of a path, of which Linux takes 4,096 bytes.
LONGEST_PATH = 4096
#: Bytes of the largest file of records.
LARGEST_RECORDS = 1 << 30


def path_of(name: str, value: object) -> str:
    """The path or hub id in the option `name`, `~` expanded where it begins with a user that exists.

    Raises:
        SettingError: neither a text nor an os.PathLike, or nothing that a file can be called.
    """
    try:
        text = os.fspath(value)
    except Exception:  # no path, or a stranger's __fspath__ fails
        text = None
    if not isinstance(text, str):
        raise SettingError(f"{name} is {shown(value)}, it must be a directory or a hub id")
    try:
        usable = b"\0" not in os.fsencode(text) and len(text) <= LONGEST_PATH
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise SettingError(f"{name} is {shown(text)}, which no file can be called")
    return os.path.expanduser(text)  # unlike Path.expanduser, leaves the name of an unknown user as it is


def file_kind(path: str | os.PathLike) -> str | None:
    """ "file", "directory", or "other" (a device, a pipe, a socket), behind links; None for what does not exist.

    pathlib's own questions raise OSError for a name that is too long, and answer "no" where it cannot be known.

    Raises:
        CheckpointError: it cannot be known: no permission, a circle of links, a name that is too long.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL, or a lone surrogate
        raise CheckpointError(f"{shown(os.fspath(path))}: no file can be called so") from None
    return "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "other"


def read_file(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """The bytes of a file. A device or pipe in its place is never opened, and a size is never believed.

    Raises:
        CheckpointError: missing, unreadable, no regular file, or larger than `largest` bytes.
    """
    kind = file_kind(path)
    if kind != "file":
        kinds = {None: "missing", "directory": "cannot be read: Is a directory"}
        raise CheckpointError(f"{path}: {kinds.get(kind, 'cannot be read: not a regular file')}")
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > largest:
        raise CheckpointError(f"{path}: larger than {largest:,} bytes, which no such file of a dolly-v2 is")
    return content


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting, should a pipe have taken the file's place in the meantime."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_atomically(path: Path, text: str, private: bool = False) -> None:
    """Write a UTF-8 file that exists with all of `text` or not at all, even after a power failure.

    Args:
        path: of the file.
        text: its content.
        private: only its owner may read and write it, whatever the umask.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n", opener=_open_private if private else None) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # of a full disk, for instance
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _open_private(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)  # should it be there already
    return descriptor


def write_json(path: Path, value: dict, private: bool = False) -> None:
    """Write a JSON object, indented, with `write_atomically`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", private)


@contextmanager
def new_directory(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes `target` when the block succeeds and is removed otherwise.

    Raises:
        CheckpointError: `target` exists and `replace` is false, or it is not a directory.
        OSError: it cannot be made; the caller knows a remedy.
    """
    _check_absent(target, replace)
    target = Path(os.path.realpath(target))  # through a link: what it points to is replaced, on that file system
    incomplete, old = _names_beside(target, "incomplete", "old")
    target.parent.mkdir(parents=True, exist_ok=True)
    incomplete.mkdir()
    try:
        yield incomplete
        _check_absent(target, replace)  # another writer may have been faster
        if target.exists():
            target.rename(old)
        incomplete.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path beside `target` for the block to write and close; it becomes `target` when the block succeeds.

    Otherwise it is removed. It gets its name when its bytes are on the disk: the file is complete or absent even after
    a power failure.

    Raises:
        CheckpointError: `target` exists.
    """
    target = Path(target).resolve()
    _check_absent(target, replace=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    [incomplete] = _names_beside(target, "incomplete")
    try:
        yield incomplete
        with open(incomplete, "rb+") as file:
            os.fsync(file.fileno())
        _check_absent(target, replace=False)  # another writer may have been faster
        incomplete.rename(target)
    finally:
        incomplete.unlink(missing_ok=True)


def _names_beside(target: Path, *states: str) -> list[Path]:
    # Not the process id alone: in a container it is often the same one again, and a killed process leaves its files.
    unique = f"{os.getpid()}.{secrets.token_hex(4)}"
    return [target.with_name(f".{target.name}.{unique}.{state}") for state in states]


def remove_leftovers(target: Path) -> list[Path]:
    """Remove what processes left that were killed in new_directory(target), which may be as large as a model.

    Only for a caller who knows that nobody is writing `target` now. The previous directory (`.old`) is kept where
    `target` is missing: it is the only one.
    """
    target = Path(target).resolve()
    leftover = re.compile(re.escape(f".{target.name}.") + r"[0-9]+\.[0-9a-f]{8}\.(incomplete|old)")
    found = [path for path in target.parent.glob(".*") if (match := leftover.fullmatch(path.name))
             and (match[1] == "incomplete" or target.exists())]  # fmt: skip
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def _check_absent(target: Path, replace: bool) -> None:
    kind = file_kind(target)
    if kind is not None and not (replace and kind == "directory"):
        raise CheckpointError(f"{target}: exists already; give another name or remove it")


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises CheckpointError."""
    return parse_json(read_file(path), path)


def parse_json(content: bytes, path: Path) -> dict:
    """As read_json, of bytes that were read from `path`."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON in UTF-8 ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_json_lines(path: Path, check: Callable[[dict], str | None]) -> list[dict]:
    """The JSON objects of a file, one per line; empty lines are skipped.

    Args:
        path: the file. Only line feeds end a line: a text may contain other line separators.
        check: returns what is wrong with an object, or None.

    Raises:
        SettingError: names the file and the line, what was found and what was expected.
    """
    try:
        data = read_file(path, LARGEST_RECORDS)
    except CheckpointError as error:
        raise SettingError(str(error)) from None
    return parse_json_lines(data, path, check)


def parse_json_lines(data: bytes, path: Path, check: Callable[[dict], str | None]) -> list[dict]:
    """As read_json_lines, of bytes that were read from `path`."""
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json_line(line)
        except ValueError as error:
            raise SettingError(f"{path}:{number}: {error}") from None
        if problem := check(row):
            raise SettingError(f"{path}:{number}: {problem}")
        rows.append(row)
    return rows


def parse_json_line(line: bytes) -> dict:
    """The JSON object in a line. Raises ValueError, which says what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({one_line(error)})") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, found {type(row).__name__}")
    return row


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError, and CheckpointError for a device or a pipe."""
    if file_kind(path) == "other":
        raise CheckpointError(f"{path}: cannot be read: not a regular file")
    with open(path, "rb") as file:
        return stream_sha256(file)


def stream_sha256(file: BinaryIO, before_each: Callable[[], object] = lambda: None) -> str:
    """SHA-256 of what is left of an open file, in hexadecimal; `before_each` is called before each block is hashed."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while size := file.readinto(block):
        before_each()
        digest.update(block[:size])
    return digest.hexdigest()


def free_disk(path: str | os.PathLike) -> int:
    """Bytes free on the file system that holds `path`, or would hold it."""
    existing = Path(os.path.expanduser(path)).absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_disk(path: str | os.PathLike, need: float, what: str, remedy: str = "") -> None:
    """Raises HardwareError, ending in the remedy, unless `need` bytes for `what` are free on the disk of `path`."""
    if need > (free := free_disk(path)):
        hint = f"; {remedy}" if remedy else ""
        raise HardwareError(f"{path}: {what} needs {gigabytes(need)} of disk, {gigabytes(free)} are free{hint}")


def gigabytes(count: float) -> str:
    """Bytes as GB (10^9) with two decimals."""
    return f"{count / 1e9:.2f} GB"
