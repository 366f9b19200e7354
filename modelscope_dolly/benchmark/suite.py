"""`dolly bench`: how fast, beside what this machine can do at best and beside other engines on the same weights.

Figures are medians of at least three repeats after a warm-up, unless fewer are asked for; a row that something else
disturbed says so.
"""

from __future__ import annotations

import datetime
import sys

from modelscope_dolly.benchmark import (
    cold_start,
    draft_model_speed,
    engine_timing,
    many_callers,
    mixed_lengths,
    prompt_lookup_speed,
    quantization_quality,
    server_speed,
)
from modelscope_dolly.benchmark.bench_options import MODES, BenchSettings
from modelscope_dolly.benchmark.bench_run import BenchRun
from modelscope_dolly.benchmark.machine import describe_machine
from modelscope_dolly.benchmark.process import progress

_MEASUREMENTS = {
    "speed": engine_timing.measure, "mixed": mixed_lengths.measure, "cold": cold_start.measure,
    "lookup": prompt_lookup_speed.measure, "draft": draft_model_speed.measure, "callers": many_callers.measure,
    "serve": server_speed.measure,
}  # fmt: skip


def run_benchmark(settings: BenchSettings, results: dict | None = None) -> dict:
    """Measure what the settings ask for.

    Args:
        settings: the checked flags.
        results: is filled as figures come in, so that those of a run that is stopped are not lost.

    Returns:
        command, date, machine, settings, limits; then `rows` and `missing` (speed), `mixed`, `cold`, `lookup`, `draft`,
        `callers`, `serve` or `quality`. Seconds and bytes unless a name says otherwise.

    Raises:
        DollyError: our own engine cannot do it, or a setting is wrong. A peer that fails has an `error` in its row.
    """
    run = BenchRun(settings, results)
    run.results |= {
        "command": " ".join(["dolly", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": vars(settings) | {"peer_python": None},
    }
    try:
        if settings.quality:
            quantization_quality.measure(run)
        else:
            with run.weights():
                machine = describe_machine(run.device, run.threads)
                run.results |= {"machine": machine, "dtypes": list(run.dtypes), "device": str(run.device)}
                _MEASUREMENTS[settings.mode](run)
        assert not run.results.pop("not_measured", None), "something was not measured, and nothing said so"
        return run.results
    finally:
        progress(None)


def has_figures(results: dict) -> bool:
    """Whether a run that ended early has measured anything."""
    return any(part.get("rows") for part in (results, *(results.get(mode, {}) for mode in MODES)))
