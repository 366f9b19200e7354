"""What a file of answers is made with: kept beside it, so that a run goes on only with the same."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.errors import SettingError, shown
from modelscope_dolly.files import file_kind, read_json
from modelscope_dolly.generation_settings import SEEDS, GenerationSettings
from modelscope_dolly.hardware import dtype_name

if TYPE_CHECKING:
    from modelscope_dolly.batch.input_rows import InputRows
    from modelscope_dolly.load import Dolly

VERSION = 1


def describe(
    rows: InputRows, dolly: Dolly, settings: GenerationSettings, quantize: str | None, draft: str | None
) -> dict[str, Any]:
    """Everything that the answers depend on, JSON-ready. The seed is None where none was given, or none is needed."""
    checkpoint = dolly.checkpoint
    weights = {file for file, _ in checkpoint.tensors.values()}
    verified = manifest.read(checkpoint.path) or {}  # when it was loaded
    described = {
        "version": VERSION,
        "input": {"sha256": rows.sha256, "format": rows.format, "rows": rows.count},
        "model": {
            "files_sha256": manifest.model_digest(checkpoint.path, weights, verified),
            "device": dolly.device.type,
            "dtype": dtype_name(dolly.dtype),
            "quantize": quantize or checkpoint.quantization,
            "draft": draft,
        },
        "settings": {**dataclasses.asdict(settings), "seed": settings.seed if settings.do_sample else None},
    }
    return json.loads(json.dumps(described))  # as it will be read


def settle(path: Path, wanted: dict[str, Any], answers: Path, overwrite: bool) -> bool:
    """Whether the answers that are there belong to this run, which goes on with them.

    Where no seed was given, `wanted` gets that of the answers, or a new one.

    Args:
        path: of the description that was kept, if there is one.
        wanted: that of this run.
        answers: the file beside it.
        overwrite: other answers than those of this run are to be replaced.

    Raises:
        SettingError: there are others, and they are not to be replaced; names what differs.
    """
    found = read_json(path) if file_kind(path) is not None else None
    settings = wanted["settings"]
    if settings["do_sample"] and settings["seed"] is None:
        kept = found.get("settings") if found else None
        settings["seed"] = kept.get("seed") if isinstance(kept, Mapping) else None
        if settings["seed"] is None:
            settings["seed"] = secrets.randbelow(SEEDS)
    different = list(_differences(found, wanted)) if found is not None else []
    if found is not None and not different:
        return True
    if file_kind(answers) is not None and not overwrite:
        why = f"holds answers of another run ({'; '.join(different)}); repeat that run's command" if found else (
            f"exists, and no {path.name} says what made it"
        )  # fmt: skip
        raise SettingError(f"{answers}: {why}; give another name, or replace it with --overwrite")
    return False


def _differences(found: Mapping, wanted: Mapping, inside: str = "") -> Iterator[str]:
    """What differs, in words."""
    for name in {**wanted, **found}:
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{inside}{name} ")
        elif old != new:
            yield f"{inside}{name} is {_value(new)}, was {_value(old)}"


def _value(value: Any) -> str:
    text = shown(value, 60)
    return f"{text[:13]}...'" if isinstance(value, str) and len(value) == 64 else text  # a digest
