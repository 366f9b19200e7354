"""Files: crash-safe writing, JSON, digests, and disk space. Whatever is written is complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modelscope_dolly.errors import CheckpointError, HardwareError, SettingError, one_line


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file that exists with all of `text` or not at all, even after a power failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object, indented, with `write_atomically`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_directory(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes `target` when the block succeeds and is removed otherwise.

    Raises:
        CheckpointError: `target` exists and `replace` is false, or it is not a directory.
    """
    target = Path(target).resolve()  # through a link: what it points to is replaced, on that file system
    _check_absent(target, replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    incomplete, old = _names_beside(target, "incomplete", "old")
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
    if target.exists() and not (replace and target.is_dir()):
        raise CheckpointError(f"{target}: exists already; give another name or remove it")


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
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
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_json_lines(data, path, check)


def parse_json_lines(data: bytes, path: Path, check: Callable[[dict], str | None]) -> list[dict]:
    """As read_json_lines, of bytes that were read from `path`."""
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise SettingError(f"{path}:{number}: not JSON in UTF-8 ({one_line(error)})") from None
        problem = check(row) if isinstance(row, dict) else f"must be a JSON object, found {type(row).__name__}"
        if problem:
            raise SettingError(f"{path}:{number}: {problem}")
        rows.append(row)
    return rows


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def free_disk(path: str | os.PathLike) -> int:
    """Bytes free on the file system that holds `path`, or would hold it."""
    existing = Path(path).expanduser().absolute()
    while not existing.exists():
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
