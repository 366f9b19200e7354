"""Paragraphs of report.md: what became of the records, what the samples became, base beside result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from modelscope_dolly.compare.compare_report import PAGE_FILE, TABLE_FILE
from modelscope_dolly.files import write_atomically
from train.data.data_report import PROBLEMS_FILE, DataReport
from train.training.before_after import FOLDER
from train.training.report import PICTURE
from train.training.run_report import NAME
from train.training.samples import SAMPLES_FILE


def run_sections(run: Path, data: DataReport) -> list[str]:
    """Paragraphs on the records and on the samples."""
    parts = [f"![loss]({PICTURE})"] if (run / PICTURE).exists() else []
    parts += ["## Records", _block(str(data))]
    if (run / PROBLEMS_FILE).exists():
        parts.append(f"All of these are in [{PROBLEMS_FILE}]({PROBLEMS_FILE}).")
    return parts + samples_section(run / SAMPLES_FILE)


def add_comparison(run: Path) -> None:
    """Append the comparison with the base to the report, where there is one."""
    table, report = run / FOLDER / TABLE_FILE, run / NAME
    if table.exists():
        parts = ["## Before and after", _block(table.read_text("utf-8").rstrip("\n")),
                 f"To read and mark: [{PAGE_FILE}]({FOLDER}/{PAGE_FILE})."]  # fmt: skip
        write_atomically(report, "\n\n".join([report.read_text("utf-8").rstrip("\n"), *parts]) + "\n")


def samples_section(path: Path) -> list[str]:
    """The answers to each sample in the order of the steps; none where there is no file."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    questions = dict.fromkeys((row["instruction"], row["context"]) for row in rows)
    parts = ["## Samples", "Greedy answers with the weights after so many steps."] if rows else []
    for number, (instruction, context) in enumerate(questions, 1):
        parts += [f"**Sample {number}**", _block(f"{instruction}\n\n{context}".rstrip())]
        answers = [row for row in rows if (row["instruction"], row["context"]) == (instruction, context)]
        parts += _without_repetition(answers)
    return parts


def _without_repetition(answers: Sequence[dict]) -> list[str]:
    """Each answer once, with the steps at which it was given in a row."""
    parts: list[tuple[str, list[int]]] = []
    for answer in answers:
        text = answer["answer"] + ("" if answer["ended"] else " ...")
        if parts and parts[-1][0] == text:
            parts[-1][1].append(answer["step"])
        else:
            parts.append((text, [answer["step"]]))
    return [
        f"Step {steps[0]}{f' to {steps[-1]}' if len(steps) > 1 else ''}:\n\n{_block(text)}" for text, steps in parts
    ]


def _block(text: str) -> str:
    """Text as it stands: behind more backticks than it has in a row."""
    longest, row = 2, 0
    for character in text:
        row = row + 1 if character == "`" else 0
        longest = max(longest, row)
    fence = "`" * (longest + 1)
    return f"{fence}text\n{text}\n{fence}"
