"""What a run leaves for people: run.json and metrics.jsonl read back, the loss curve, and a summary in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import CheckpointError, SettingError
from modelscope_dolly.files import parse_json_lines, read_json, write_atomically
from train.recipe_file import shown

METRICS, PICTURE = "metrics.jsonl", "loss.png"
#: What to do about a damaged record: a run reads its own only to go on with them.
_REMEDY = "no checkpoint depends on it: correct it, or move it out of the run directory and start again"


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a run, from its run.json; at least one. Raises CheckpointError."""
    try:
        starts = read_json(path).get("starts")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_REMEDY}") from None
    if not isinstance(starts, list) or not starts or not all(isinstance(start, dict) for start in starts):
        raise CheckpointError(f"{path}: `starts` must be a list with the starts of the run; {_REMEDY}")
    return starts


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows) of metrics.jsonl, in step order; none where there is no such file.

    Raises:
        CheckpointError: the file is damaged; names the line.
    """
    path = run / METRICS
    try:
        rows = _parse_rows(path.read_bytes(), path)
    except FileNotFoundError:
        rows = []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from None
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def cut_metrics(path: Path, step: int) -> None:
    """Remove the rows after a step, from which a run resumes, and what a run that was killed left of its last row.

    Raises:
        CheckpointError: another line is damaged; nothing was removed.
    """
    if path.exists():
        rows = _parse_rows(path.read_bytes().rpartition(b"\n")[0], path)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def _parse_rows(data: bytes, path: Path) -> list[dict]:
    try:
        return parse_json_lines(data, path, _problem_of_row)
    except SettingError as error:
        raise CheckpointError(f"{error}; {_REMEDY}") from None


def _problem_of_row(row: dict) -> str | None:
    if type(row.get("step")) is not int:
        return f"`step` must be a whole number, found {shown(row.get('step'))}"
    wrong = [name for name in ("loss", "eval_loss") if name in row and type(row[name]) not in (int, float)]
    return f"`{wrong[0]}` must be a number, found {shown(row[wrong[0]])}" if wrong else None


def draw_loss(run: Path) -> Path | None:
    """Write loss.png; None where matplotlib is not installed (it is in the extra `train`), or no step was recorded."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, evaluations = read_metrics(run)
    if not steps:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(
        [row["step"] for row in steps], [row["loss"] for row in steps], linewidth=0.8, alpha=0.5, label="training"
    )
    smooth = running_mean([row["loss"] for row in steps], 20)
    axes.plot([row["step"] for row in steps], smooth, linewidth=1.8, color="C0", label="training, mean of 20 steps")
    if evaluations:
        points = [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations]
        axes.plot(*points, "o-", markersize=3.5, color="C1", label="held-out records")
    axes.set(xlabel="optimizer step", ylabel="loss per response token (nats)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    growing = run / f".{PICTURE}.{os.getpid()}.tmp"  # a picture that is there is a whole one
    try:
        figure.savefig(growing, format="png")
        os.replace(growing, run / PICTURE)
    finally:
        growing.unlink(missing_ok=True)
        pyplot.close(figure)
    return run / PICTURE


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` before it."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def summary(run: Path) -> str:
    """A few lines about a finished run."""
    steps, evaluations = read_metrics(run)
    if not steps:
        return f"no steps in {run / METRICS}"
    tokens, seconds = (sum(row.get(name, 0) for row in steps) for name in ("tokens", "seconds"))
    lines = [
        f"{len(steps)} steps, {tokens:,} tokens in {seconds:.0f} s: {tokens / max(seconds, 1e-9):,.0f} a second",
        f"training loss {steps[0]['loss']:.4f} at the first step, {steps[-1]['loss']:.4f} at the last",
    ]
    if evaluations:
        best = min(evaluations, key=lambda row: row["eval_loss"])
        lines.append(
            f"held-out loss {evaluations[-1]['eval_loss']:.4f} at the last evaluation, {best['eval_loss']:.4f} at the "
            f"best (step {best['step']})"
        )
    return "\n".join(lines)
