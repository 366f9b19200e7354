"""Small checkpoint directories, and ways to make one hostile that no accident would find."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from modelscope_dolly.checkpoint.writer import export_checkpoint
from tests.support import layouts
from tests.support.models import random_model
from train.nano import build_tokenizer, read_records

#: Values for a key of JSON that another program, or an attacker, wrote.
JSON_VALUES = (
    None, True, 0, -1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", " ", "x" * 300, "a\0b", "\ud800",
    "../x", "/etc/passwd", "\x1b[2J", [], {}, [None], {"": ""}, {"a": "x" * 300}, "gpt_neox", "float32", 1e308,
)  # fmt: skip


def tiny_checkpoint(place: Path) -> Path:
    """A complete directory with random weights and a manifest."""
    tokenizer = build_tokenizer(read_records(), vocabulary=1024)
    return export_checkpoint(random_model(vocab_size=len(tokenizer.tokenizer)), tokenizer, place / "dolly-tiny")


def make_hostile(directory: Path, rng: random.Random) -> str:
    """Do one harm to a directory; says which."""
    harms = [_special_file, _change_json, _change_json, _long_name, _strange]
    if all(path.is_file() for path in directory.iterdir()):  # it reads the files, and a device has no end
        harms += [layouts.damage, layouts.damage]
    harm = rng.choice(harms)
    return harm(directory, rng)


def _special_file(directory: Path, rng: random.Random) -> str:
    name = rng.choice(_names(directory))
    path, kind = directory / name, rng.randrange(8)
    _remove(path)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path)
    else:
        path.symlink_to(("/dev/full", "/dev/zero", "/proc/self/mem", "/nowhere", "/dev/null")[kind - 3])
    return f"special file {kind} for {name}"


def _change_json(directory: Path, rng: random.Random) -> str:
    name = rng.choice([name for name in _names(directory) if name.endswith(".json") and (directory / name).is_file()])
    try:
        value = json.loads((directory / name).read_text(encoding="utf-8"))
    except ValueError:
        return f"{name} is broken already"
    place, path = value, []
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        path.append(key)
        if rng.random() < 0.5 or not isinstance(place[key], (dict, list)) or not place[key]:
            _replace(place, key, rng)
            break
        place = place[key]
    (directory / name).write_text(json.dumps(value), encoding="utf-8")
    return f"another value of {name}: {path}"


def _replace(place: Any, key: Any, rng: random.Random) -> None:
    if rng.random() < 0.1:
        del place[key]
    elif isinstance(place, dict) and rng.random() < 0.1:
        place[rng.choice(("x" * 300, "a\0b", "\ud800", "", "../x"))] = place.pop(key)
    else:
        place[key] = rng.choice(JSON_VALUES)


def _long_name(directory: Path, rng: random.Random) -> str:
    names = ("x" * 300, "x" * 5000, "a\0b", "..", ".", "", "\ud800", "sub/x", "model.safetensors", "\x1b]0;x\x07")
    table = {f"t{number}": rng.choice(names) for number in range(rng.randrange(1, 4))}
    ending = rng.choice(("model.safetensors", "pytorch_model.bin"))
    _remove(directory / f"{ending}.index.json")
    (directory / f"{ending}.index.json").write_text(json.dumps({"weight_map": table}), encoding="utf-8")
    return f"an index of {ending}"


def _strange(directory: Path, rng: random.Random) -> str:
    name = rng.choice(_names(directory))
    _remove(directory / name)
    content = rng.choice((b"[" * 10**6, b'{"a":' * 10**5, b" " * 20_000_000, b"9" * 100_000, rng.randbytes(5000)))
    (directory / name).write_bytes(content)
    return f"{len(content)} bytes of {content[:5]!r} in {name}"


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
