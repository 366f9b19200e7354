"""A comparison as a table for a terminal, as Markdown, as JSON, and as files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from modelscope_dolly.compare.marking_page import page
from modelscope_dolly.compare.paired_bootstrap import CONFIDENCE, RESAMPLES
from modelscope_dolly.compare.side_by_side import Comparison
from modelscope_dolly.evaluation.tables import align
from modelscope_dolly.files import write_atomically

JSON_FILE, TABLE_FILE, PAGE_FILE = "compare.json", "compare.txt", "compare.html"


def rows(comparison: Comparison) -> list[list[str]]:
    """Cells: what is compared, then the two models."""
    pairs, scored = comparison.pairs, comparison.scored
    lines = [["", *comparison.names]]
    if scored:
        losses = [comparison.loss(which) for which in (0, 1)]
        lines.append(["held-out loss per token (nats)", *(f"{loss:.4f}" for loss in losses)])
        lines.append(["perplexity", *(f"{math.exp(min(loss, 700)):.4g}" for loss in losses)])
    if comparison.wins:
        lines.append(["lower loss, records", *(f"{wins} of {len(scored)}" for wins in comparison.wins)])
    columns = list(zip(*pairs, strict=True))
    ended = [sum(answer.finish_reason == "stop" for answer in column) for column in columns]
    lines.append(["answers that ended by themselves", *(f"{count} of {len(pairs)}" for count in ended)])
    lengths = [sum(answer.new_tokens for answer in column) / len(pairs) for column in columns]
    lines.append(["tokens per answer", *(f"{length:.1f}" for length in lengths)])
    return lines


def sentences(comparison: Comparison) -> list[str]:
    """What the table does not show: the interval, and what is missing."""
    first, second = comparison.names
    lines, interval = [], comparison.interval
    if interval is not None:
        tokens = sum(len(pair[0].ids) for pair in comparison.scored)
        around = ""
        if interval.low is not None:
            around = (
                f", {100 * CONFIDENCE:.0f} % interval {interval.low:+.4f} to {interval.high:+.4f} (paired bootstrap, "
                f"{RESAMPLES:,} resamples)"
            )
        lines.append(
            f"{second} minus {first}: {interval.difference:+.4f} nats per token{around}, over {tokens:,} tokens of "
            f"{len(comparison.scored)} records; below 0: {second} is better"
        )
    elif comparison.scored:
        lines.append("the two tokenizers split the answers differently: losses per token cannot be compared")
    else:
        lines.append("no record has an answer that fits the window: there is no held-out loss")
    same = sum(one.text == other.text for one, other in comparison.pairs)
    lines.append(f"the same answer to {same} of {len(comparison.records)} records (greedy decoding)")
    if len(comparison.records) < comparison.wanted:
        lines.append(f"time for {len(comparison.records)} of {comparison.wanted} records; give more minutes for all")
    problems = sum(pair[0].problem is not None or pair[1].problem is not None for pair in comparison.pairs)
    if problems:
        lines.append(f"{problems} prompts leave no room for an answer in the window")
    return lines


def text(comparison: Comparison) -> str:
    """For a terminal."""
    return "\n".join([*align(rows(comparison)), *sentences(comparison)])


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All of it."""
    interval = comparison.interval
    return {
        "models": [
            {"name": name, "model": model.model, "dtype": model.dtype, "device": model.device,
             "seconds": round(model.seconds, 3), "loss": comparison.loss(which)}
            for which, (name, model) in enumerate(zip(comparison.names, comparison.models, strict=True))
        ],
        "difference": interval._asdict() if interval else None,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "wins": comparison.wins,
        "records_wanted": comparison.wanted,
        "records": [
            {**vars(record), "answers": [
                {"text": answer.text, "finish_reason": answer.finish_reason, "new_tokens": answer.new_tokens,
                 "loss": answer.loss, "tokens": len(answer.ids), "problem": answer.problem} for answer in pair
            ]}
            for record, pair in zip(comparison.records, comparison.pairs, strict=True)
        ],
    }  # fmt: skip


def write(comparison: Comparison, directory: Path, blind: bool = False) -> list[Path]:
    """compare.json, compare.txt and compare.html in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        JSON_FILE: json.dumps(as_json(comparison), indent=2, ensure_ascii=False) + "\n",
        TABLE_FILE: text(comparison) + "\n",
        PAGE_FILE: page(comparison, blind),
    }
    for name, content in texts.items():
        write_atomically(directory / name, content)
    return [directory / name for name in texts]
