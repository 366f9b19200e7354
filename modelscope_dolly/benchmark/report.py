"""The figures of `dolly bench` for people."""

from __future__ import annotations

_NAMES = {"hf": "transformers", "hf-compile": "transformers, compiled", "llamacpp": "llama.cpp", "vllm": "vLLM"}


def report(found: dict) -> str:
    """All that was measured, as text."""
    if "quality" in found:
        from .quality import report as quality_report

        return quality_report(found["quality"])
    lines = [_machine(found), ""]
    for part, write in (("rows", _speed), ("mixed", _mixed), ("cold", _cold), ("lookup", _lookup)):
        if part in found:
            lines += write(found)
    return "\n".join([*lines, *(["stopped before all was measured"] if "stopped" in found else [])])


def _machine(found: dict) -> str:
    machine = found["machine"]
    threads = f"{machine['threads']} threads, " if machine["kind"] == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "python")
    extra = f" ({', '.join(machine['instructions'])})" if machine["instructions"] and machine["kind"] == "cpu" else ""
    return f"{machine['device']}{extra}, {threads}{versions}; {found['date']}"


def _speed(found: dict) -> list[str]:
    settings, limit = found["settings"], found["limits"]
    peaks = ", ".join(f"{name} {peak['max'] / 1e12:.2f}" for name, peak in limit["matrix"].items())
    lines = [
        f"{settings['shape'] or settings['model']}: {settings['prompt_tokens']} prompt and {settings['new_tokens']} "
        f"new tokens, greedy, medians of {settings['repeats']}",
        f"limit: reads {limit['bandwidth']['max'] / 1e9:.1f} GB/s, matrix product in TFLOP/s: {peaks}"
        + "".join(f"   ~ {note}" for note in limit["disturbed"]),
        "",
    ]
    rows = [row for row in found["rows"] if "error" not in row]
    headings = ("engine", "format", "batch", "load s", "1st tok s", "prefill tok/s", "x hf", "of peak", "ms/step")
    headings += ("tok/s", "x hf", "of bandw.", "peak GB")
    table = [headings, *(_cells(row) for row in rows)]
    notes = ["", *(f"   ~ {note}" for note in (", ".join(row["disturbed"]) for row in rows))]
    lines += [line + note for line, note in zip(columns(table), _notes(notes), strict=True)]
    yardstick = next((row["yardstick"] for row in rows if "yardstick" in row), None)
    lines.append("")
    if yardstick:
        lines.append(f"x hf: speed over transformers' eager {yardstick} at the same batch; above 1 is faster")
    lines.append(
        "of bandw.: bytes of weights per step / bandwidth / time; of peak: the prompt's products beside the limit"
    )
    lines += [f"{_NAMES.get(row['engine'], row['engine'])} {row['format']} failed: {row['error']}"
              for row in found["rows"] if "error" in row]  # fmt: skip
    return lines + _missing(found["missing"])


def _notes(notes: list[str]) -> list[str]:
    return [note if note.strip(" ~") else "" for note in notes]


def _missing(missing: dict[str, str]) -> list[str]:
    return [f"{_NAMES.get(engine, engine)}: {reason}" for engine, reason in missing.items()]


def _cells(row: dict) -> tuple[str, ...]:
    return (
        _NAMES.get(row["engine"], row["engine"]), row["format"], str(row["batch"]), _number(row["load_s"], 1),
        _number(row["first_token_s"]["median"], 2), _number(row["prefill_tokens_per_s"], 0),
        _number(row.get("prefill_times_hf"), 2), _share(row.get("share_of_matrix_peak")),
        f"{row['step_s']['median'] * 1000:.1f} ±{row['step_s']['spread'] * 50:.0f}%", _number(row["tokens_per_s"], 2),
        _number(row.get("times_hf"), 2), _share(row["share_of_bandwidth"]),
        _number(row["peak_bytes"] / 1e9 if row["peak_bytes"] else None, 1),
    )  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def columns(table: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines; the first two columns to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _mixed(found: dict) -> list[str]:
    part = found["mixed"]
    lengths = sorted(part["lengths"])
    lines = [
        f"{len(lengths)} requests, answers of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{lengths[len(lengths) // 2]}, all together {sum(lengths)}), {part['slots']} at once",
        "",
    ]
    table = [("engine", "format", "seconds", "requests/s", "tok/s", "x hf", "useful steps")]
    for row in part["rows"]:
        table.append((
            _NAMES.get(row["engine"], row["engine"]), row["format"], _number(row["seconds"]["median"], 1),
            _number(row["requests_per_s"], 3), _number(row["tokens_per_s"], 2), _number(row.get("times_hf"), 2),
            _share(row["useful_share"]),
        ))  # fmt: skip
    notes = ["", *(f"   ~ {', '.join(row['disturbed'])}" for row in part["rows"])]
    lines += [line + note for line, note in zip(columns(table), _notes(notes), strict=True)]
    return [*lines, "", "useful steps: tokens that were wanted / steps of a slot, idle ones included"]


def _cold(found: dict) -> list[str]:
    names = list(found["cold"][0]["phases"])
    table = [("format", "files from", *(f"{name.replace('_', ' ')} s" for name in names), "first token s", "peak GB")]
    for row in found["cold"]:
        phases = (_number(row["phases"][name]["median"], 2) for name in names)
        total, peak = _number(row["total"]["median"], 2), _number(row["peak_bytes"] / 1e9, 1)
        table.append((row["format"], row["files_from"], *phases, total, peak))
    notes = ["", *(f"   ~ {', '.join(row['disturbed'])}" for row in found["cold"])]
    lines = [line + note for line, note in zip(columns(table), _notes(notes), strict=True)]
    return ["from the start of a process to its first token; check: SHA-256 of every file of the manifest", "", *lines]


def _lookup(found: dict) -> list[str]:
    table = [("format", "text", "answers", "tokens", "plain s", "guessing s", "times", "accepted", "passes/token")]
    for row in found["lookup"]["rows"]:
        table.append((
            row["format"], row["kind"], str(row["answers"]), str(row["tokens"]), _number(row["plain_s"]["median"], 1),
            _number(row["guessing_s"]["median"], 1), _number(row["times_plain"], 2), _share(row["accepted_share"]),
            _number(row["passes_per_token"], 2),
        ))  # fmt: skip
    notes = ["", *(f"   ~ {', '.join(row['disturbed'])}" for row in found["lookup"]["rows"])]
    return [line + note for line, note in zip(columns(table), _notes(notes), strict=True)]
