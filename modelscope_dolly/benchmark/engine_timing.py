"""`dolly bench`: load, first token, prefill and decode of our engine and its peers, beside the machine's limits."""

from __future__ import annotations

import math
from pathlib import Path

from modelscope_dolly.benchmark import hardware_limits
from modelscope_dolly.benchmark.bench_run import BenchRun, Variant
from modelscope_dolly.benchmark.peer_choice import check_memory, choose_variants
from modelscope_dolly.benchmark.repeats import disturbances, spread
from modelscope_dolly.errors import DollyError


def measure(run: BenchRun) -> None:
    """`limits`; `rows`, one per engine, format and batch; `missing`, the peers that are not there, and why."""
    run.results["limits"] = measure_limits(run)
    variants, run.results["missing"] = choose_variants(run)
    rows = run.results["rows"] = []
    batches = run.settings.batches
    run.expect(_name(variant, batch) for variant in variants for batch in batches)
    prompts = {str(batch): [run.prompt() for _ in range(batch)] for batch in batches}
    try:
        for variant in variants:
            _measure_variant(run, variant, prompts)
    finally:
        compare(rows, run.dtypes[0])
        for row in rows:
            row.pop("answers", None)


def measure_limits(run: BenchRun) -> dict:
    """What hardware_limits.run_limits measures, in a process of its own: on a GPU its memory is then free again."""
    result = run.child(Variant("the machine's", "limit", ""), limits=list(run.dtypes))
    limits = {name: result[name] for name in ("bandwidth", "matrix")}
    return {**limits, "disturbed": disturbances({"bandwidth": limits["bandwidth"], **limits["matrix"]}, result)}


def _measure_variant(run: BenchRun, variant: Variant, prompts: dict[str, list[list[int]]]) -> None:
    rows, settings = run.results["rows"], run.settings
    job = {"prompts": prompts, "new_tokens": settings.new_tokens}
    if variant.engine == "llamacpp":
        job |= {"program": variant.program, "gguf": settings.gguf}

    def rows_of(result: dict) -> dict[str, dict]:
        return {_name(variant, timing["batch"]): _row(run, variant, timing, result) for timing in result["rows"]}

    try:
        check_memory(run, variant)
        run.child_rows(rows, variant, rows_of, **job)
    except DollyError as error:
        if variant.engine == "dolly":
            raise
        rows.append({"engine": variant.engine, "format": variant.format, "error": str(error)})
        run.measured(_name(variant, batch) for batch in settings.batches)


def _name(variant: Variant, batch: int) -> str:
    return f"{variant.name} at batch {batch}"


def _row(run: BenchRun, variant: Variant, timing: dict, result: dict) -> dict:
    """Figures of one batch, and their shares of the limit, which is the best of its repeats: that much is possible."""
    limits, linear = run.results["limits"], hardware_limits.linear_weights(run.config)
    batch, step, first = timing["batch"], spread(timing["step_s"]), spread(timing["first_token_s"])
    prompt_tokens = batch * run.settings.prompt_tokens
    if variant.engine == "llamacpp":
        # a share of the file: all of it but the embedding is read at each step
        table = run.config.vocab_size * run.config.hidden_size
        size = Path(run.settings.gguf).stat().st_size * linear / (linear + table)
    else:
        size = hardware_limits.bytes_per_step(run.config, variant.format, result.get("held"))
    row = {
        "engine": variant.engine, "format": variant.format, "held": result.get("held"), "batch": batch,
        **{name: result.get(name) for name in ("version", "load_s", "load_peak_bytes", "peak_bytes")},
        "first_token_s": first, "step_s": step,
        "prefill_tokens_per_s": prompt_tokens / first["median"], "tokens_per_s": batch / step["median"],
        "answers": timing.get("answers"), "disturbed": disturbances({"first token": first, "step": step}, result),
        "bytes_per_step": size, "share_of_bandwidth": size / limits["bandwidth"]["max"] / step["median"],
    }  # fmt: skip
    if peak := limits["matrix"].get(variant.format):
        row["share_of_matrix_peak"] = 2 * linear * prompt_tokens / first["median"] / peak["max"]
    return row


def compare(rows: list[dict], dtype: str) -> None:
    """Add the ratios to transformers' eager row of the same batch in the yardstick's number type, and token agreement.

    `times_hf`, `prefill_times_hf`: above 1 is faster. `same_tokens`: share of each answer's tokens before the first one
    that differs from transformers'.
    """
    measured = [row for row in rows if "error" not in row]
    for row in measured:
        eager = [other for other in measured if other["engine"] == "hf" and other["batch"] == row["batch"]]
        if not eager:
            continue
        yardstick = min(eager, key=lambda other: other["format"] != dtype)
        row["yardstick"] = yardstick["format"]
        row["times_hf"] = row["tokens_per_s"] / yardstick["tokens_per_s"]
        row["prefill_times_hf"] = row["prefill_tokens_per_s"] / yardstick["prefill_tokens_per_s"]
        if row.get("answers"):
            row["same_tokens"] = same_tokens(row["answers"], yardstick["answers"])


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Mean share of the tokens of `theirs` before the first difference."""
    shares = []
    for answer, other in zip(ours, theirs, strict=True):
        equal = [a == b for a, b in zip(answer, other, strict=False)]
        shares.append((equal.index(False) if False in equal else len(equal)) / max(1, len(other)))
    return math.fsum(shares) / len(shares)
