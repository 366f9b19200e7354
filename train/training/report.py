"""What a run leaves for people, from its metrics.jsonl: the loss curve as a picture, and a summary in words."""

from __future__ import annotations

import json
from pathlib import Path


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows) of metrics.jsonl, in step order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def draw_loss(run: Path) -> Path | None:
    """Write loss.png; None where matplotlib is not installed (it is in the extra `train`)."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, evaluations = read_metrics(run)
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
    figure.savefig(run / "loss.png")
    pyplot.close(figure)
    return run / "loss.png"


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` before it."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def summary(run: Path) -> str:
    """A few lines about a finished run."""
    steps, evaluations = read_metrics(run)
    tokens, seconds = sum(row["tokens"] for row in steps), sum(row["seconds"] for row in steps)
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
