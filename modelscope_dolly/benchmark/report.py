"""The figures of `dolly bench` as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelscope_dolly.evaluation.tables import align

_NAMES = {"hf": "transformers", "hf-compile": "transformers, compiled", "llamacpp": "llama.cpp", "vllm": "vLLM"}
#: Heading of a column, and its cell in a row.
Column = tuple[str, Callable[[dict], str]]


def format_report(results: dict) -> str:
    """All that was measured."""
    lines = [] if "quality" in results else [_machine(results), ""]
    for part, write in _PARTS.items():
        if part in results:
            lines += write(results)
    if unmeasured := results.get("not_measured"):
        why = f"stopped by {results['stopped']}" if "stopped" in results else "ended by an error"
        lines += ["", f"{why}; not measured: {'; '.join(unmeasured)}"]
    return "\n".join(lines)


def _machine(results: dict) -> str:
    machine = results["machine"]
    on_cpu, gpu = machine["kind"] == "cpu", machine.get("gpu")
    threads = f"{machine['threads']} threads, " if on_cpu else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "python")
    extra = f" ({', '.join(machine['instructions'])})" if machine["instructions"] and on_cpu else ""
    driver = f", driver {gpu['driver']}, CUDA {gpu['cuda']}" if gpu else ""
    return f"{machine['device']}{extra}{driver}, {threads}{versions}; {results['date']}"


def _table(rows: Sequence[dict], columns: Sequence[Column], left: int = 2) -> list[str]:
    """Aligned lines, the first `left` columns flush left; what disturbed a row stands behind it."""
    lines = align([[heading for heading, _ in columns], *([cell(row) for _, cell in columns] for row in rows)], left)
    notes = ["", *(f"   ~ {', '.join(row['disturbed'])}" if row.get("disturbed") else "" for row in rows)]
    return [line + note for line, note in zip(lines, notes, strict=True)]


def _number(key: str, digits: int, factor: float = 1.0) -> Callable[[dict], str]:
    """A figure, or the median of one that was repeated; "-" where there is none."""

    def cell(row: dict) -> str:
        value = row.get(key)
        value = value["median"] if isinstance(value, dict) else value
        return "-" if value is None else f"{value * factor:,.{digits}f}"

    return cell


def _spread(key: str, digits: int, factor: float = 1.0) -> Callable[[dict], str]:
    """A median, and half the distance of slowest and fastest; one repeat has none."""

    def cell(row: dict) -> str:
        half = f" ±{row[key]['spread'] * 50:.0f}%" if len(row[key]["values"]) > 1 else ""
        return _number(key, digits, factor)(row) + half

    return cell


def _share(key: str) -> Callable[[dict], str]:
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.0%}"


def _text(key: str) -> Callable[[dict], str]:
    return lambda row: str(row[key])


def _engine(row: dict) -> str:
    return _NAMES.get(row["engine"], row["engine"])


_ENGINE, _FORMAT, _PEAK = ("engine", _engine), ("format", _text("format")), ("peak GB", _number("peak_bytes", 1, 1e-9))


def _repeats(results: dict) -> str:
    repeats = results["settings"]["repeats"]
    return f"medians of {repeats}" if repeats > 1 else "each measured once"


def _missing(missing: dict[str, str]) -> list[str]:
    return [f"{_NAMES.get(engine, engine)}: {reason}" for engine, reason in missing.items()]


def _speed(results: dict) -> list[str]:
    settings, limits = results["settings"], results["limits"]
    peaks = ", ".join(f"{name} {peak['max'] / 1e12:.2f}" for name, peak in limits["matrix"].items())
    # what is commonly quoted as the bandwidth of a GPU
    copy = limits["bandwidth"].get("copy")
    copies = f" (copies {copy['max'] / 1e9:.1f} GB/s, read and written bytes)" if copy else ""
    rows = [row for row in results["rows"] if "error" not in row]
    table = _table(rows, [
        _ENGINE, _FORMAT, ("batch", _text("batch")), ("load s", _number("load_s", 1)),
        ("1st tok s", _number("first_token_s", 2)), ("prefill tok/s", _number("prefill_tokens_per_s", 0)),
        ("x hf", _number("prefill_times_hf", 2)), ("of peak", _share("share_of_matrix_peak")),
        ("ms/step", _spread("step_s", 1, 1000)), ("tok/s", _number("tokens_per_s", 2)),
        ("x hf", _number("times_hf", 2)), ("of bandw.", _share("share_of_bandwidth")), _PEAK,
    ])  # fmt: skip
    lines = [
        f"{settings['shape'] or settings['model']}: {settings['prompt_tokens']} prompt and {settings['new_tokens']} "
        f"new tokens, greedy, {_repeats(results)}",
        f"limit: reads {limits['bandwidth']['max'] / 1e9:.1f} GB/s{copies}, matrix product in TFLOP/s: {peaks}"
        + "".join(f"   ~ {note}" for note in limits["disturbed"]),
        "", *table, "",
    ]  # fmt: skip
    yardstick = next((row["yardstick"] for row in rows if "yardstick" in row), None)
    if yardstick:
        lines.append(f"x hf: speed over transformers' eager {yardstick} at the same batch; above 1 is faster")
    lines.append(
        "of bandw.: bytes of weights per step / bandwidth / time; of peak: the prompt's products beside the limit"
    )
    held = dict.fromkeys(row["format"] for row in rows if row.get("held") not in (None, row["format"]))
    lines += [f"dolly {name}: linear weights stay in bf16, as stored, and are multiplied in {name}" for name in held]
    failed = [row for row in results["rows"] if "error" in row]
    lines += [f"{_engine(row)} {row['format']} failed: {row['error']}" for row in failed]
    return lines + _missing(results["missing"])


def _mixed(results: dict) -> list[str]:
    part = results["mixed"]
    lengths = sorted(part["lengths"])
    table = _table(part["rows"], [
        _ENGINE, _FORMAT, ("seconds", _spread("seconds", 1)), ("requests/s", _number("requests_per_s", 3)),
        ("tok/s", _number("tokens_per_s", 2)), ("x hf", _number("times_hf", 2)),
        ("useful steps", _share("useful_share")),
    ])  # fmt: skip
    lines = [
        f"{len(lengths)} requests, answers of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{lengths[len(lengths) // 2]}, all together {sum(lengths)}), {part['slots']} at once, {_repeats(results)}",
        "", *table, "", "useful steps: tokens that were wanted / steps of a slot, idle ones included",
    ]  # fmt: skip
    if any("times_hf" in row for row in part["rows"]):
        lines.append("x hf: requests/s over those of transformers' eager static batches; above 1 is faster")
    return lines + _missing(part["missing"])


def _cold(results: dict) -> list[str]:
    rows = results["cold"]["rows"]
    phases = list(rows[0]["phases"])
    columns = [(f"{name.replace('_', ' ')} s", _number(name, 2)) for name in phases]
    columns = [_FORMAT, ("files from", _text("files_from")), *columns, ("first token s", _spread("total", 2)), _PEAK]
    head = f"from the start of a process to its first token, {_repeats(results)}; "
    return [f"{head}check: SHA-256 of every file of the manifest", "",
            *_table([{**row, **row["phases"]} for row in rows], columns)]  # fmt: skip


def _lookup(results: dict) -> list[str]:
    return _table(results["lookup"]["rows"], [
        _FORMAT, ("text", _text("kind")), ("answers", _text("answers")), ("tokens", _text("tokens")),
        ("plain s", _number("plain_s", 1)), ("lookup s", _number("guessing_s", 1)),
        ("times", _number("times_plain", 2)), ("accepted", _share("accepted_share")),
        ("steps/token", _number("passes_per_token", 2)),
    ])  # fmt: skip


def _draft(results: dict) -> list[str]:
    part = results["draft"]
    columns = [
        _FORMAT, ("draft tokens", _text("guesses")), ("plain ms", _number("plain_s", 1, 1000)),
        ("draft ms", _number("draft_s", 1, 1000)), ("verify ms", _number("verify_s", 1, 1000)),
        ("pays from", lambda row: "never" if row["pays_from"] is None else f"{row['pays_from']:.0%}"),
    ]  # fmt: skip
    columns += [(f"x at {rate:.0%}", _number(rate, 2)) for rate in part["rows"][0]["times_plain"]]
    return [
        f"draft tokens of {part['draft']}, {_repeats(results)}", "",
        *_table([{**row, **row["times_plain"]} for row in part["rows"]], columns), "",
        "pays from: acceptance rate at which it is as fast as plain decoding; x: times its speed",
        "the acceptance rate depends on models and text: it was not measured, and random weights cannot say",
    ]  # fmt: skip


def _callers(results: dict) -> list[str]:
    settings = results["settings"]
    table = _table(results["callers"]["rows"], [
        _FORMAT, ("callers", _text("callers")), ("threads s", _spread("threads_s", 2)),
        ("list s", _spread("list_s", 2)), ("threads tok/s", _number("threads_tokens_per_s", 1)),
        ("list tok/s", _number("list_tokens_per_s", 1)), ("of list", _share("share")),
    ])  # fmt: skip
    pauses = _table(results["callers"]["pauses"], [
        _FORMAT, ("step ms", _spread("step_s", 1, 1000)), ("longest pause ms", _spread("longest_s", 0, 1000)),
        ("prompt s", _spread("prompt_s", 2)),
    ], left=1)  # fmt: skip
    return [
        f"{settings['prompt_tokens']} prompt and {settings['new_tokens']} new tokens each, {_repeats(results)}", "",
        *table, "", "of list: tokens/s of threads with one question each over those of one list of them", "",
        "an answer beside somebody else's prompt of 2,000 tokens:", "", *pauses, "",
        "step: between two of its tokens before; prompt: until the other one's first token",
    ]  # fmt: skip


def _serve(results: dict) -> list[str]:
    part, settings = results["serve"], results["settings"]
    table = _table(part["rows"], [
        _ENGINE, _FORMAT, ("clients", _text("clients")), ("requests/s", _number("requests_per_s", 2)),
        ("tok/s", _number("tokens_per_s", 1)), ("of engine", _share("share")),
        ("first ms", _number("first_p50_s", 0, 1000)), ("p95", _number("first_p95_s", 0, 1000)),
        ("between ms", _number("between_p50_s", 1, 1000)), ("p95", _number("between_p95_s", 1, 1000)),
    ])  # fmt: skip
    return [
        f"{settings['prompt_tokens']} prompt and up to {settings['new_tokens']} new tokens, each client asks "
        f"{part['requests']} times in turn, {_repeats(results)}", "", *table, "",
        "first, between: to the first token and between two, median and 95 % of them",
        *_missing(part["missing"]),
    ]  # fmt: skip


def _quality(results: dict) -> list[str]:
    part = results["quality"]
    stressed = any(row["outliers"] for row in part["rows"])
    outliers = [("outliers", lambda row: f"{row['outliers']:g}" if row["outliers"] else "-")] if stressed else []
    table = _table(part["rows"], [
        _FORMAT, *outliers, ("KL mean", lambda row: f"{row['kl_mean']:.2e}"),
        ("KL 99 %", lambda row: f"{row['kl_p99']:.2e}"),
        ("top-1 same", lambda row: f"{row['top1']:.2%}"), ("perplexity", lambda row: f"{row['perplexity']:.4f}"),
    ], left=1)  # fmt: skip
    lines = [
        f"{part['model']}: {part['tokens']} tokens of {part['records']} answers from {part['data']}, each "
        f"predicted from the right tokens before it; reference {part['reference']}",
        "", *table,
    ]  # fmt: skip
    if part["data"] == "built-in sample":
        lines += ["", "the built-in sample is small; give --data FILE for figures to decide by"]
    return lines


#: What may be in the results, and what writes it.
_PARTS = {
    "rows": _speed,
    "mixed": _mixed,
    "cold": _cold,
    "lookup": _lookup,
    "draft": _draft,
    "callers": _callers,
    "serve": _serve,
    "quality": _quality,
}
