"""report.md: how a finished run went, for people: its figures, where its weights are from, and what stood out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelscope_dolly.files import write_atomically
from train.training.report import read_metrics, summary
from train.training.spikes import spikes

NAME = "report.md"
_MOST_SPIKES = 50


def write_report(run: Path, warmup_steps: int, lines: list[str], sections: Sequence[str] = ()) -> Path:
    """Write report.md into a run directory.

    Args:
        run: the directory.
        warmup_steps: of the learning rate, see spikes.py.
        lines: what the run says about its end: where the weights of final/ are from, why it ended.
        sections: paragraphs that follow, see report_sections.py.
    """
    steps, _ = read_metrics(run)
    found = spikes(steps, warmup_steps)
    text = [f"# {run.name}", "", *(f"- {line}" for line in [*summary(run).splitlines(), *lines]), ""]
    text += ["## Steps that stand out", ""]
    text += [f"- {spike}" for spike in found[:_MOST_SPIKES]] or [
        "None: no loss, gradient norm or learning rate that jumps."
    ]
    if len(found) > _MOST_SPIKES:
        text.append(f"- and {len(found) - _MOST_SPIKES} more")
    text += [line for section in sections for line in ("", section)]
    write_atomically(run / NAME, "\n".join([*text, ""]))
    return run / NAME
