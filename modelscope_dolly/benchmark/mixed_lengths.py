"""`dolly bench --mixed`: requests whose answers differ in length, our slots beside transformers' static batches."""

from __future__ import annotations

import math

from modelscope_dolly.benchmark.bench_run import BenchRun, Variant
from modelscope_dolly.benchmark.peer_choice import choose_variants
from modelscope_dolly.benchmark.repeats import disturbances, spread


def measure(run: BenchRun) -> None:
    """`mixed`: requests per second, and the share of slot steps that made a wanted token."""
    slots, lengths = run.settings.slots, answer_lengths(run)
    requests = [(run.prompt(), length) for length in lengths]
    variants, missing = choose_variants(run)
    variants = [variant for variant in variants if variant.engine in ("dolly", "hf", "hf-compile")]
    rows: list[dict] = []
    run.results["mixed"] = {"lengths": lengths, "slots": slots, "rows": rows, "missing": missing}
    run.expect(variant.name for variant in variants)
    for variant in variants:
        result = run.child(variant, requests=requests, slots=slots)
        rows.append(_row(variant, len(requests), result))
        run.measured([variant.name])
        yardstick = next((row for row in rows if row["engine"] == "hf"), None)
        for row in rows if yardstick else ():
            row["times_hf"] = row["requests_per_s"] / yardstick["requests_per_s"]


def answer_lengths(run: BenchRun) -> list[int]:
    """From 5 to --new-tokens, each doubling as likely as the next, as dolly's answers are."""
    low, high = math.log(min(5, run.settings.new_tokens)), math.log(run.settings.new_tokens)
    return [round(math.exp(run.random.uniform(low, high))) for _ in range(run.settings.mixed)]


def _row(variant: Variant, requests: int, result: dict) -> dict:
    seconds = spread(result["seconds"])
    return {
        "engine": variant.engine, "format": variant.format, "seconds": seconds, "peak_bytes": result["peak_bytes"],
        "requests_per_s": requests / seconds["median"], "tokens_per_s": result["useful_steps"] / seconds["median"],
        "useful_share": result["useful_steps"] / result["slot_steps"],
        "disturbed": disturbances({"time": seconds}, result),
    }  # fmt: skip
