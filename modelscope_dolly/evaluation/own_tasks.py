"""Tasks beside the seven of the card: scored by lm-eval, stored and shown apart, so that no row of the card changes.

OUTPUT/<model>-<key of the run>/own/<task>.json             metrics, and all that determines them
OUTPUT/<model>-<key of the run>/own/<task>.samples.jsonl    one line per document
OUTPUT/own_tasks.md, OUTPUT/own_tasks.json                  all runs in OUTPUT
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation.store import RunIdentity
from modelscope_dolly.evaluation.tables import align
from modelscope_dolly.files import read_json, write_atomically

FORMAT, FOLDER = 1, "own"


@dataclass(frozen=True)
class OwnTaskResult:
    """Metrics of one task that is not of the card.

    Attributes:
        run: what determined them, with `data` and `version`; its scorer is lm-eval's own.
        data: digest of the file, or of the downloaded rows.
        size: documents.
        metrics: lm-eval's name of each, with its filter -> value.
        errors: standard error of each, where lm-eval gives one.
    """

    task: str
    run: RunIdentity
    data: str
    version: str
    size: int
    metrics: dict[str, float]
    errors: dict[str, float | None] = field(default_factory=dict)
    finished: str = ""


def write(output: Path, result: OwnTaskResult, samples: list[dict]) -> Path:
    """Store one task; its samples first, so that a stored result always has them."""
    folder = output / result.run.directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
    write_atomically(folder / f"{result.task}.samples.jsonl", lines)
    path = folder / f"{result.task}.json"
    write_atomically(path, json.dumps({"format": FORMAT, **asdict(result)}, indent=2, ensure_ascii=False) + "\n")
    return path


def find(output: Path, run: RunIdentity, task: str, data: str, version: str) -> OwnTaskResult | None:
    """The stored result of this run, task and data, or None."""
    path = output / run.directory / FOLDER / f"{task}.json"
    if not path.is_file():
        return None
    stored = read(path)
    return stored if (stored.run, stored.data, stored.version) == (run, data, version) else None


def read(path: Path) -> OwnTaskResult:
    """Raises SettingError for a file that `write` did not make."""
    content = read_json(path)
    try:
        if content.pop("format") != FORMAT:
            raise ValueError(f"format, expected {FORMAT}")
        return OwnTaskResult(**{**content, "run": RunIdentity(**content["run"])})
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(
            f"{path}: not a result of dolly eval ({type(error).__name__}: {error}); move it away"
        ) from None


def stored(output: Path) -> Iterator[OwnTaskResult]:
    """The results of every run below `output`."""
    yield from map(read, sorted(output.glob(f"*/{FOLDER}/*.json")) if output.is_dir() else [])


def cells(results: Sequence[OwnTaskResult]) -> list[list[str]]:
    """A line per metric."""
    lines = [["task", "model", "metric", "value", "standard error", "documents"]]
    for result in results:
        name = f"{result.run.model}@{result.run.revision}" if result.run.revision else result.run.model
        notes = [f"limit {result.run.limit}"] if result.run.limit is not None else []
        notes += [f"template {result.run.template}"] if result.run.template != "none" else []
        name += f" ({', '.join(notes)})" if notes else ""
        for metric, value in result.metrics.items():
            error = result.errors.get(metric)
            lines.append([result.task, name, metric, f"{value:.6g}", "" if error is None else f"{error:.2g}",
                          str(result.size)])  # fmt: skip
    return lines


def text_table(results: Sequence[OwnTaskResult]) -> str:
    return "\n".join(align(cells(results), left=3))


def write_tables(output: Path) -> list[Path]:
    """own_tasks.md and own_tasks.json over all runs in the output directory."""
    results = sorted(stored(output), key=lambda result: (result.task, result.run.model))
    lines = cells(results)
    rows = [lines[0], ["---"] * 3 + ["---:"] * 3, *lines[1:]]
    markdown = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    files: dict[str, Any] = {
        "own_tasks.md": markdown + "\n",
        "own_tasks.json": json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in files.items():
        write_atomically(output / name, text)
    return [output / name for name in files]
