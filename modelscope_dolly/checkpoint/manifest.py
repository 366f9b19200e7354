"""manifest.json: size and SHA-256 of every file of a directory, written last. Its presence says the directory is whole.

Format: {"version": 1, "files": {"config.json": {"size": 730, "sha256": "..."}, ...}}, paths with forward slashes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.files import file_kind, file_sha256, read_json, write_json

NAME = "manifest.json"
#: Files besides the weights that a model's answers depend on.
_MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write(directory: Path, hidden: bool = True) -> None:
    """Write the manifest of all regular files below `directory`; without `hidden` only of those whose path has no name
    that begins with a dot, where download clients keep notes of their own."""

    def listed(path: Path) -> bool:
        names = path.relative_to(directory).parts
        return path.name != NAME and (hidden or not any(name.startswith(".") for name in names)) and path.is_file()

    paths = sorted(path for path in directory.rglob("*") if listed(path))
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_sha256, paths))
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    write_json(directory / NAME, {"version": 1, "files": files})


def read(directory: Path) -> dict[str, dict] | None:
    """{path: {"size": bytes, "sha256": hex}}, or None where there is no manifest.

    Raises:
        CheckpointError: the manifest itself is damaged.
    """
    path = directory / NAME
    if file_kind(path) is None:
        return None
    try:
        files = read_json(path)["files"]
        for name, entry in files.items():
            relative = PurePosixPath(name)
            inside = not relative.is_absolute() and ".." not in relative.parts and b"\0" not in name.encode("utf-8")
            if not inside or type(entry["size"]) is not int or not _SHA256.fullmatch(entry["sha256"]):
                raise ValueError(f"entry {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the manifest is damaged ({type(error).__name__}: {error})") from None
    return files


def differences(
    directory: Path, names: Iterable[str] | None = None, sha256: Callable[[Path], str] = file_sha256
) -> list[str]:
    """How files differ from the manifest, one message each; empty when all match or there is no manifest.

    Args:
        directory: of the checkpoint.
        names: files to compare (default: all that the manifest lists). One without a recorded checksum is a difference.
        sha256: of a regular file.
    """
    entries = read(directory)
    if entries is None:
        return []
    names = list(entries if names is None else names)
    with ThreadPoolExecutor() as pool:
        messages = pool.map(lambda name: _difference(directory / name, entries.get(name), sha256), names)
        return [message for message in messages if message]


def model_digest(directory: Path, weights: Iterable[Path], verified: Container[str] = ()) -> str:
    """SHA-256 over names and digests of all files that determine a model's answers.

    Args:
        directory: of the model.
        weights: its weight files.
        verified: names of files that have just been compared with the manifest, and need not be read again.

    Raises:
        CheckpointError: there is a manifest, and a file is not the one that it lists.
    """
    names = [file.name for file in weights] + [name for name in _MODEL_FILES if (directory / name).is_file()]
    if messages := differences(directory, [name for name in names if name not in verified]):
        raise CheckpointError(messages[0])
    entries = read(directory)
    if entries is not None:
        digests = [entries[name]["sha256"] for name in names]
    else:
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(lambda name: file_sha256(directory / name), names))
    lines = sorted(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_digest(directory: Path, weights: Iterable[Path], read_files: bool = True) -> str | None:
    """SHA-256 over the digests of the weight files, whatever they are called: the same for a copy of the weights.

    Args:
        directory: of the model.
        weights: its weight files.
        read_files: hash the files where there is no manifest; otherwise the result is then None.

    Raises:
        CheckpointError: the manifest does not list a file, or a file cannot be read.
    """
    entries, files = read(directory), list(weights)
    if entries is None and not read_files:
        return None
    if entries is not None:
        if missing := [file for file in files if file.name not in entries]:
            raise CheckpointError(f"{missing[0]}: not listed in {NAME}, no recorded checksum")
        digests = [entries[file.name]["sha256"] for file in files]
    else:
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(file_sha256, files))
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _difference(path: Path, entry: dict | None, sha256: Callable[[Path], str]) -> str | None:
    if entry is None:
        return f"{path}: not listed in {NAME}, no recorded checksum"
    try:
        if file_kind(path) == "other":
            return f"{path}: not a regular file, expected {entry['size']} bytes"
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{path}: {size} bytes, expected {entry['size']}"
        digest = sha256(path)
    except FileNotFoundError:
        return f"{path}: missing, expected {entry['size']} bytes"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    except CheckpointError as error:
        return str(error)
    if digest != entry["sha256"]:
        return f"{path}: sha256 {digest[:12]}..., expected {entry['sha256'][:12]}...: its content changed"
    return None
