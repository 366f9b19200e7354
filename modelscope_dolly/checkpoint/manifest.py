"""manifest.json: size and SHA-256 of every file of a directory, written last. Its presence says the directory is whole.

Format: {"version": 1, "files": {"config.json": {"size": 730, "sha256": "..."}, ...}}, paths with forward slashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from modelscope_dolly.errors import CheckpointError, SettingError, one_line

NAME = "manifest.json"
#: Files besides the weights that a model's answers depend on.
_MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_310(file)


def _sha256_310(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there with all of `text` or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(directory: Path) -> None:
    """Make the manifest of all regular files below `directory`."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != NAME)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, paths))
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    write_atomically(directory / NAME, json.dumps({"version": 1, "files": files}, indent=2) + "\n")


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
    """The JSON objects of a file, one per line; empty lines are left out.

    Args:
        path: the file. Lines end at line feeds alone: a text may hold other line separators.
        check: what is wrong with an object, or None.

    Raises:
        SettingError: names file and line, what was found and what was expected.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise SettingError(f"{path}:{number}: not JSON in UTF-8 ({one_line(error)})") from None
        wrong = check(row) if isinstance(row, dict) else f"must be a JSON object, found {type(row).__name__}"
        if wrong:
            raise SettingError(f"{path}:{number}: {wrong}")
        rows.append(row)
    return rows


def read(directory: Path) -> dict[str, dict] | None:
    """{path: {"size": bytes, "sha256": hex}}, or None where there is no manifest.

    Raises:
        CheckpointError: the manifest itself is damaged.
    """
    path = directory / NAME
    if not path.exists():
        return None
    try:
        files = read_json(path)["files"]
        for name, entry in files.items():
            place = PurePosixPath(name)
            inside = not place.is_absolute() and ".." not in place.parts and b"\0" not in name.encode("utf-8")
            if not inside or type(entry["size"]) is not int or not _SHA256.fullmatch(entry["sha256"]):
                raise ValueError(f"entry {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the manifest is damaged ({type(error).__name__}: {error})") from None
    return files


def problems(directory: Path, names: Iterable[str] | None = None) -> list[str]:
    """What differs from the manifest; empty when all is well or there is no manifest.

    Args:
        directory: of the checkpoint.
        names: files to look at (default: all that the manifest lists). One that it does not list is a problem.
    """
    listed = read(directory)
    if listed is None:
        return []
    names = list(listed if names is None else names)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _compare(directory, name, listed.get(name)), names)
        return [problem for problem in found if problem]


def model_digest(directory: Path, weights: Iterable[Path]) -> str:
    """SHA-256 over names and digests of all files that determine a model's answers.

    Args:
        directory: of the model.
        weights: its weight files.

    Raises:
        CheckpointError: there is a manifest, and a file is not the one that it lists.
    """
    names = [file.name for file in weights] + [name for name in _MODEL_FILES if (directory / name).is_file()]
    if differences := problems(directory, names):
        raise CheckpointError(differences[0])
    listed = read(directory)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: listed[name]["sha256"] if listed else sha256(directory / name), names)
    lines = sorted(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _compare(directory: Path, name: str, entry: dict | None) -> str | None:
    path = directory / name
    if entry is None:
        return f"{path}: not listed in {NAME}, so it has no recorded checksum"
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{path}: {size} bytes, expected {entry['size']}"
        digest = sha256(path)
    except FileNotFoundError:
        return f"{path}: missing, expected {entry['size']} bytes"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if digest != entry["sha256"]:
        return f"{path}: sha256 {digest[:12]}..., expected {entry['sha256'][:12]}...: its content changed"
    return None
