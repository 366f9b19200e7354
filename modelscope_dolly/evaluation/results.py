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

from modelscope_dolly.checkpoint.manifest import write_atomically
from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation import store
from modelscope_dolly.evaluation.published import BY_NAME, NAMES
from modelscope_dolly.evaluation.rows import Row, differences, failures, measured_rows, row_from, table_rows


def _cells(row: Row) -> list[str]:
    scores = [f"{row.scores[name]:.6g}" if name in row.scores else "n/a" for name in NAMES]
    return [row.label, *scores, "n/a" if row.gmean is None else f"{row.gmean:.6g}"]


HEADER = ["model", *NAMES, "gmean"]


def text_table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [HEADER, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def details(rows: Sequence[Row]) -> list[str]:
    """One sentence per measured row: the settings it depends on."""
    return [f"{row.label}: {row.detail}." for row in rows if not row.published]


def text_differences(row: Row, reference: Row) -> str:
    """Two lines below the table: items and standard errors from the published row."""
    if row.obstacles:
        return f"{row.name}: NOT comparable with the card: {'; '.join(row.obstacles)}"
    found = differences(row, reference)
    width = max(map(len, NAMES)) + 2
    lines = [
        f"{row.name}, difference from the card's {reference.name}",
        " " * 17 + "".join(f"{n:>{width}}" for n in found),
    ]
    lines.append(f"{'right answers':<17}" + "".join(f"{d.items:>+{width}}" for d in found.values()))
    lines.append(f"{'standard errors':<17}" + "".join(f"{d.errors:>+{width}.2f}" for d in found.values()))
    if row.gmean is not None:
        away = row.gmean - reference.gmean
        lines.append(f"gmean {away:+.6f}, {away / reference.gmean_error:+.2f} standard errors")
    return "\n".join(lines)


def _markdown(rows: Sequence[Row]) -> str:
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def markdown_table(directory: str | Path, files_sha256: str | None = None, name: str | None = None) -> str:
    """Markdown for a model card: measured rows of a directory of `dolly eval` beside the published ones.

    Args:
        directory: its output.
        files_sha256: digest of the one model whose rows are wanted (manifest.model_digest); None: all rows.
        name: what to call these rows.

    Raises:
        SettingError: the directory holds no results, or none of these files.
    """
    found = [list(tasks.values()) for tasks in store.runs(Path(directory))]
    if not found:
        raise SettingError(f"{directory}: holds no results; dolly eval MODEL --output {directory} makes some")
    mine = [tasks for tasks in found if files_sha256 in (None, tasks[0].run.files_sha256)]
    if not mine:
        others = sorted({f"{tasks[0].run.model} ({tasks[0].run.files_sha256[:12]})" for tasks in found})
        raise SettingError(
            f"{directory}: holds results of {', '.join(others)}, none of the files that are published "
            f"({str(files_sha256)[:12]}); run dolly eval on this very checkpoint"
        )
    measured = [replace(row, name=name or row.name) for row in map(row_from, mine)]
    notes = details(table_rows(measured))
    notes.append("Rows marked (card) are the published ones. Zero-shot; acc_norm, but acc for winogrande and boolq.")
    return "\n\n".join([_markdown(table_rows(measured)), *notes]) + "\n"


def csv_table(rows: Sequence[Row]) -> str:
    """One line per row, with standard errors; empty where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    errors = [f"{name}_stderr" for name in (*NAMES, "gmean")]
    writer.writerow(["model", "source", "comparable", "why_not", *NAMES, "gmean", *errors])
    for facts in as_json(rows):
        values = [*(facts["scores"].get(name) for name in NAMES), facts["gmean"]]
        values += [*(facts["stderr"].get(name) for name in NAMES), facts["gmean_stderr"]]
        cells = ["" if value is None else f"{value:.6g}" for value in values]
        why = "; ".join(facts["not_comparable_because"])
        writer.writerow([facts["model"], facts["source"], str(facts["comparable"]).lower(), why, *cells])
    return text.getvalue()


def as_json(rows: Sequence[Row]) -> list[dict]:
    """Rows as JSON-ready dictionaries, unrounded."""
    return [
        {
            "model": row.name,
            "source": "card" if row.published else "measured",
            "comparable": not row.obstacles,
            "not_comparable_because": list(row.obstacles),
            "detail": row.detail,
            "correct": {name: right for name, (right, _) in row.counts.items()},
            "documents": {name: size for name, (_, size) in row.counts.items()},
            "metric": {name: BY_NAME[name].metric for name in row.counts},
            "scores": row.scores,
            "stderr": row.errors,
            "gmean": row.gmean,
            "gmean_stderr": row.gmean_error,
        }
        for row in rows
    ]


def report(
    found: Sequence[store.TaskResult], output: Path, reference: Row | None, check: bool, json_wanted: bool
) -> int:
    """Write the tables, print them, and return the exit code: 1 where `check` is wanted and fails.

    Args:
        found: results of one run, in any order.
        output: its directory, whose other runs are shown too.
        reference: the published row to compare with.
    """
    files = write_tables(output)
    rows = table_rows(measured_rows(output))
    # Tasks that the same run did earlier count: the row is what is stored.
    stored = next(one for one in store.runs(output) if next(iter(one.values())).run == found[0].run)
    row = row_from(list(stored.values()))
    failed = failures(row, reference) if check else []
    if json_wanted:
        facts = {"rows": as_json(rows), "this": as_json([row])[0], "files": list(map(str, files))}
        print(json.dumps({**facts, "check": {"passed": not failed, "failures": failed} if check else None}, indent=2))
        return 1 if failed else 0
    print(text_table(rows), *details(rows), sep="\n")
    if reference is not None:
        print(text_differences(row, reference))
    if check:
        print(
            "\n".join([f"does NOT reproduce {reference.name}:", *failed]) if failed else f"reproduces {reference.name}"
        )
    print(f"written: {', '.join(map(str, files))}")
    return 1 if failed else 0


def write_tables(output: Path) -> list[Path]:
    """table.md, table.csv, table.json and plot.png over all runs below the output directory."""
    rows = table_rows(measured_rows(output))
    texts = {
        "table.md": markdown_table(output),
        "table.csv": csv_table(rows),
        "table.json": json.dumps(as_json(rows), indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        write_atomically(output / name, text)
    return [*(output / name for name in texts), plot(rows, output / "plot.png")]


def plot(rows: Sequence[Row], path: Path) -> Path:
    """A dot per row and panel with its 95 % interval (1.96 standard errors); a panel per task and one for the gmean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [*NAMES, "gmean"]
    figure = Figure(figsize=(14, 1.6 + 0.55 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(2, 4, sharey=True).flat
    for name, axes in zip(panels, places, strict=True):
        for height, row in enumerate(rows):
            value = row.gmean if name == "gmean" else row.scores.get(name)
            error = row.gmean_error if name == "gmean" else row.errors.get(name)
            if value is not None:
                style = "o" if row.published else "x" if row.obstacles else "D"
                colour = "tab:gray" if row.published else "tab:red" if row.obstacles else "tab:blue"
                around = 1.96 * (error or 0)
                reach = [[min(around, value)], [min(around, 1 - value)]]
                axes.errorbar(value, height, xerr=reach, fmt=style, color=colour, capsize=2, markersize=5)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    labels = [row.label if len(row.label) <= 60 else f"{row.label[:57]}..." for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    figure.suptitle("Zero-shot scores with 95 % intervals; grey: the card, red: not comparable", fontsize=11)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)
    return path
