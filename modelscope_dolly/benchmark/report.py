"""The figures of `dolly bench` for people."""

from __future__ import annotations

_NAMES = {"hf": "transformers", "hf-compile": "transformers, compiled", "llamacpp": "llama.cpp", "vllm": "vLLM"}


def report(found: dict) -> str:
    """All that was measured, as text."""
    lines = [] if "quality" in found else [_machine(found), ""]
    for part, write in _PARTS.items():
        if part in found:
            lines += write(found)
    return "\n".join([*lines, *_end(found)])


def _end(found: dict) -> list[str]:
    """Why a run ended early, and what it did not get to."""
    if not found.get("not_measured"):
        return []
    why = f"stopped by {found['stopped']}" if "stopped" in found else "ended by an error"
    return ["", f"{why}; not measured: {'; '.join(found['not_measured'])}"]


def _quality(found: dict) -> list[str]:
    from modelscope_dolly.benchmark.quality import report as quality_report

    return [quality_report(found["quality"])]


def _machine(found: dict) -> str:
    machine = found["machine"]
    threads = f"{machine['threads']} threads, " if machine["kind"] == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "python")
    extra = f" ({', '.join(machine['instructions'])})" if machine["instructions"] and machine["kind"] == "cpu" else ""
    gpu = machine.get("gpu")
    driver = f", driver {gpu['driver']}, CUDA {gpu['cuda']}" if gpu else ""
    return f"{machine['device']}{extra}{driver}, {threads}{versions}; {found['date']}"


def _speed(found: dict) -> list[str]:
    settings, limit = found["settings"], found["limits"]
    peaks = ", ".join(f"{name} {peak['max'] / 1e12:.2f}" for name, peak in limit["matrix"].items())
    lines = [
        f"{settings['shape'] or settings['model']}: {settings['prompt_tokens']} prompt and {settings['new_tokens']} "
        f"new tokens, greedy, {_repeats(settings)}",
        f"limit: reads {limit['bandwidth']['max'] / 1e9:.1f} GB/s{_copy(limit)}, matrix product in TFLOP/s: {peaks}"
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
    held = dict.fromkeys(row["format"] for row in rows if row.get("held") not in (None, row["format"]))
    lines += [f"dolly {name}: linear weights stay in bf16, as stored, and are multiplied in {name}" for name in held]
    lines += [f"{_NAMES.get(row['engine'], row['engine'])} {row['format']} failed: {row['error']}"
              for row in found["rows"] if "error" in row]  # fmt: skip
    return lines + _missing(found["missing"])


def _repeats(settings: dict) -> str:
    return f"medians of {settings['repeats']}" if settings["repeats"] > 1 else "each measured once"


def _copy(limit: dict) -> str:
    """Of a GPU, what is commonly quoted as its bandwidth."""
    copy = limit["bandwidth"].get("copy")
    return f" (copies {copy['max'] / 1e9:.1f} GB/s, read and written bytes)" if copy else ""


def _spread(figure: dict) -> str:
    """Half the distance of slowest and fastest; one repeat has none."""
    return f" ±{figure['spread'] * 50:.0f}%" if len(figure["values"]) > 1 else ""


def _notes(notes: list[str]) -> list[str]:
    return [note if note.strip(" ~") else "" for note in notes]


def _missing(missing: dict[str, str]) -> list[str]:
    return [f"{_NAMES.get(engine, engine)}: {reason}" for engine, reason in missing.items()]


def _cells(row: dict) -> tuple[str, ...]:
    return (
        _NAMES.get(row["engine"], row["engine"]), row["format"], str(row["batch"]), _number(row["load_s"], 1),
        _number(row["first_token_s"]["median"], 2), _number(row["prefill_tokens_per_s"], 0),
        _number(row.get("prefill_times_hf"), 2), _share(row.get("share_of_matrix_peak")),
        f"{row['step_s']['median'] * 1000:.1f}{_spread(row['step_s'])}", _number(row["tokens_per_s"], 2),
        _number(row.get("times_hf"), 2), _share(row["share_of_bandwidth"]),
        _peak(row),
    )  # fmt: skip


def _peak(row: dict) -> str:
    return _number(row["peak_bytes"] / 1e9 if row["peak_bytes"] else None, 1)


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
        f"{lengths[len(lengths) // 2]}, all together {sum(lengths)}), {part['slots']} at once, "
        f"{_repeats(found['settings'])}",
        "",
    ]
    table = [("engine", "format", "seconds", "requests/s", "tok/s", "x hf", "useful steps")]
    for row in part["rows"]:
        table.append((
            _NAMES.get(row["engine"], row["engine"]), row["format"],
            _number(row["seconds"]["median"], 1) + _spread(row["seconds"]),
            _number(row["requests_per_s"], 3), _number(row["tokens_per_s"], 2), _number(row.get("times_hf"), 2),
            _share(row["useful_share"]),
        ))  # fmt: skip
    notes = ["", *(f"   ~ {', '.join(row['disturbed'])}" for row in part["rows"])]
    lines += [line + note for line, note in zip(columns(table), _notes(notes), strict=True)]
    lines += ["", "useful steps: tokens that were wanted / steps of a slot, idle ones included"]
    if any("times_hf" in row for row in part["rows"]):
        lines.append("x hf: requests/s over those of transformers' eager static batches; above 1 is faster")
    return lines + _missing(part["missing"])


def _cold(found: dict) -> list[str]:
    rows = found["cold"]["rows"]
    names = list(rows[0]["phases"])
    table = [("format", "files from", *(f"{name.replace('_', ' ')} s" for name in names), "first token s", "peak GB")]
    for row in rows:
        phases = (_number(row["phases"][name]["median"], 2) for name in names)
        total, peak = _number(row["total"]["median"], 2) + _spread(row["total"]), _peak(row)
        table.append((row["format"], row["files_from"], *phases, total, peak))
    notes = ["", *(f"   ~ {', '.join(row['disturbed'])}" for row in rows)]
    lines = [line + note for line, note in zip(columns(table), _notes(notes), strict=True)]
    head = f"from the start of a process to its first token, {_repeats(found['settings'])}; "
    return [f"{head}check: SHA-256 of every file of the manifest", "", *lines]


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


def _draft(found: dict) -> list[str]:
    rows = found["draft"]["rows"]
    rates = list(rows[0]["times_plain"])
    headings = ("format", "guesses", "plain ms", "draft ms", "verify ms", "pays from")
    table = [(*headings, *(f"x at {rate:.0%}" for rate in rates))]
    for row in rows:
        times = (_number(row[name]["median"] * 1000, 1) for name in ("plain_s", "draft_s", "verify_s"))
        gains = (_number(row["times_plain"][rate], 2) for rate in rates)
        pays = _share(row["pays_from"]) if row["pays_from"] is not None else "never"
        table.append((row["format"], str(row["guesses"]), *times, pays, *gains))
    notes = ["", *(f"   ~ {', '.join(row['disturbed'])}" for row in rows)]
    lines = [f"guesses of {found['draft']['draft']}, {_repeats(found['settings'])}", ""]
    lines += [line + note for line, note in zip(columns(table), _notes(notes), strict=True)]
    return [
        *lines, "",
        "pays from: share of guesses that must be right to be as fast as plain decoding; x: times its speed",
        "how often they are right depends on models and text: it was not measured, and random weights cannot say",
    ]  # fmt: skip


#: What may be in the figures, and who writes it.
_PARTS = {"rows": _speed, "mixed": _mixed, "cold": _cold, "lookup": _lookup, "draft": _draft, "quality": _quality}
