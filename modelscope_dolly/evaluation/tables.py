"""Tables of `dolly eval`: measured rows beside the published ones, for a terminal, a model card and other programs.

Imports neither torch nor lm-eval: the model card takes `markdown_table` from here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation import store
from modelscope_dolly.evaluation.comparison import ResultRow, differences, failures, measured_row, with_published
from modelscope_dolly.evaluation.published import TASK_BY_NAME, TASK_NAMES
from modelscope_dolly.files import write_atomically

HEADER = ["model", *TASK_NAMES, "gmean"]


def align(lines: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of cells as lines of text: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _cells(row: ResultRow) -> list[str]:
    values = [*map(row.scores.get, TASK_NAMES), row.gmean]
    return [row.label, *("n/a" if value is None else f"{value:.6g}" for value in values)]


def text_table(rows: Sequence[ResultRow]) -> str:
    """For a terminal."""
    return "\n".join(align([HEADER, *map(_cells, rows)]))


def details(rows: Sequence[ResultRow]) -> list[str]:
    """One sentence per measured row: the settings it depends on."""
    return [f"{row.label}: {row.detail}." for row in rows if not row.published]


def text_differences(row: ResultRow, reference: ResultRow) -> str:
    """Lines below the table: items and standard errors from the published row."""
    if row.obstacles:
        return f"{row.name}: NOT comparable with the card: {'; '.join(row.obstacles)}"
    by_task = differences(row, reference)
    items = ["right answers", *(f"{difference.items:+}" for difference in by_task.values())]
    errors = ["standard errors", *(f"{difference.errors:+.2f}" for difference in by_task.values())]
    lines = [f"{row.name}, difference from the card's {reference.name}", *align([["", *by_task], items, errors])]
    if row.gmean is not None:
        away = row.gmean - reference.gmean
        lines.append(f"gmean {away:+.6f}, {away / reference.gmean_error:+.2f} standard errors")
    return "\n".join(lines)


def markdown_table(directory: str | Path, files_sha256: str | None = None, name: str | None = None) -> str:
    """Markdown for a model card: measured rows of a directory of `dolly eval` beside the published ones.

    Args:
        directory: its output.
        files_sha256: digest of the one model whose rows are wanted (manifest.model_digest); None: all rows.
        name: what to call these rows.

    Raises:
        SettingError: the directory holds no results, or none of these files.
    """
    runs = list(store.runs(Path(directory)))
    if not runs:
        raise SettingError(f"{directory}: holds no results; dolly eval MODEL --output {directory} makes some")
    wanted = [results for results in runs if files_sha256 in (None, results[0].run.files_sha256)]
    if not wanted:
        others = sorted({f"{first.run.model} ({first.run.files_sha256[:12]})" for first, *_ in runs})
        raise SettingError(
            f"{directory}: holds results of {', '.join(others)}, none of the files that are published "
            f"({str(files_sha256)[:12]}); run dolly eval on this very checkpoint"
        )
    rows = with_published([replace(row, name=name or row.name) for row in map(measured_row, wanted)])
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *map(_cells, rows)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    note = "Rows marked (card) are the published ones. Zero-shot; acc_norm, but acc for winogrande and boolq."
    return "\n\n".join([table, *details(rows), note]) + "\n"


def csv_table(rows: Sequence[ResultRow]) -> str:
    """One line per row, with standard errors; empty where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    errors = [f"{name}_stderr" for name in HEADER[1:]]
    writer.writerow(["model", "source", "comparable", "why_not", *HEADER[1:], *errors])
    for row in as_json(rows):
        values = [*map(row["scores"].get, TASK_NAMES), row["gmean"]]
        values += [*map(row["stderr"].get, TASK_NAMES), row["gmean_stderr"]]
        cells = ["" if value is None else f"{value:.6g}" for value in values]
        why_not = "; ".join(row["not_comparable_because"])
        writer.writerow([row["model"], row["source"], str(row["comparable"]).lower(), why_not, *cells])
    return text.getvalue()


def as_json(rows: Sequence[ResultRow]) -> list[dict]:
    """Rows as JSON-ready dictionaries, unrounded."""
    return [
        {
            "model": row.name, "source": "card" if row.published else "measured", "comparable": not row.obstacles,
            "not_comparable_because": list(row.obstacles), "detail": row.detail,
            "correct": {task: correct for task, (correct, _) in row.counts.items()},
            "documents": {task: size for task, (_, size) in row.counts.items()},
            "metric": {task: TASK_BY_NAME[task].metric for task in row.counts},
            "scores": row.scores, "stderr": row.errors, "gmean": row.gmean, "gmean_stderr": row.gmean_error,
        }
        for row in rows
    ]  # fmt: skip


def print_results(run: store.RunIdentity, output: Path, reference: ResultRow | None, check: bool, in_json: bool) -> int:
    """Write the tables, print them, and return the exit code: 1 where `check` is wanted and fails.

    Args:
        run: the one to compare; all of its tasks that are stored count.
        output: its directory, whose other runs are shown too.
        reference: the published row to compare with.
        check: whether the run must reproduce the reference.
        in_json: print one JSON object.
    """
    rows = all_rows(output)
    files = write_tables(output, rows)
    row = next(measured_row(results) for results in store.runs(output) if results[0].run == run)
    failed = failures(row, reference) if check else []
    if in_json:
        results = {"rows": as_json(rows), "this": as_json([row])[0], "files": list(map(str, files))}
        results["check"] = {"passed": not failed, "failures": failed} if check else None
        print(json.dumps(results, indent=2))
        return 1 if failed else 0
    print(text_table(rows), *details(rows), sep="\n")
    if reference is not None:
        print(text_differences(row, reference))
    if failed:
        print(f"does NOT reproduce {reference.name}:", *failed, sep="\n")
    elif check:
        print(f"reproduces {reference.name}")
    print(f"written: {', '.join(map(str, files))}")
    return 1 if failed else 0


def all_rows(output: Path) -> list[ResultRow]:
    """The published rows, and one per run below the output directory."""
    return with_published([measured_row(results) for results in store.runs(output)])


def write_tables(output: Path, rows: Sequence[ResultRow]) -> list[Path]:
    """table.md, table.csv, table.json and plot.png of the rows in the output directory."""
    texts = {
        "table.md": markdown_table(output),
        "table.csv": csv_table(rows),
        "table.json": json.dumps(as_json(rows), indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        write_atomically(output / name, text)
    return [*(output / name for name in texts), plot(rows, output / "plot.png")]


def plot(rows: Sequence[ResultRow], path: Path) -> Path:
    """A dot per row and panel with its 95 % interval (1.96 standard errors); a panel per task and one for the gmean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.6 + 0.55 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for name, axes in zip(HEADER[1:], figure.subplots(2, 4, sharey=True).flat, strict=True):
        for height, row in enumerate(rows):
            value = row.gmean if name == "gmean" else row.scores.get(name)
            error = row.gmean_error if name == "gmean" else row.errors.get(name)
            if value is not None:
                style, colour = ("o", "gray") if row.published else ("x", "red") if row.obstacles else ("D", "blue")
                half = 1.96 * (error or 0)
                interval = [[min(half, value)], [min(half, 1 - value)]]
                axes.errorbar(value, height, xerr=interval, fmt=style, color=f"tab:{colour}", capsize=2, markersize=5)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    labels = [row.label if len(row.label) <= 60 else f"{row.label[:57]}..." for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    figure.suptitle("Zero-shot scores with 95 % intervals; grey: the card, red: not comparable", fontsize=11)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)
    return path
