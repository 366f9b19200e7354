"""`dolly bench --cold`: from the start of a process to its first token, by phase."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from modelscope_dolly.benchmark.bench_run import BenchRun
from modelscope_dolly.benchmark.process import progress
from modelscope_dolly.benchmark.repeats import disturbances, spread

#: Where the files are; whether an earlier start has compared them with the manifest, see checkpoint/verification.py.
SOURCES = (("memory", True), ("memory", False), ("disk", False))


def measure(run: BenchRun) -> None:
    """`cold`: a row for each format, from the system's file cache and from disk, with files that an earlier start has
    compared and that are compared now; each repeat is a new process."""
    rows: list[dict] = []
    run.results["cold"] = {"rows": rows}
    repeats = run.settings.repeats
    series = [
        (variant, source, again, f"{variant.format} from {_described(source, again)}")
        for variant in run.variants() for source, again in SOURCES
    ]  # fmt: skip
    run.expect(name for *_, name in series)
    for variant, source, again, name in series:
        before, starts = list(rows), []
        with tempfile.TemporaryDirectory() as remembered:
            if again:
                run.child(variant, prompt=run.prompt(), cache=remembered)  # the earlier start
            for number in range(repeats):
                progress(f"{variant.name}: start {number + 1} of {repeats}, files from {source}")
                if not _prepare_cache(run.model, drop=source == "disk"):
                    break
                cache = remembered if again else os.path.join(remembered, str(number))
                starts.append(run.child(variant, prompt=run.prompt(), cache=cache))
                rows[:] = [*before, _row(variant.format, _described(source, again), starts, repeats)]
        run.measured([name])


def _described(source: str, again: bool) -> str:
    return f"{source}, compared before" if again else source


def _row(number_format: str, source: str, starts: list[dict], repeats: int) -> dict:
    phases = {name: spread([start["phases"][name] for start in starts]) for name in starts[0]["phases"]}
    total = spread([sum(start["phases"].values()) for start in starts])
    others = max(start["others_cpus"] for start in starts)
    few = [f"{len(starts)} of {repeats} starts"] if len(starts) < repeats else []
    return {
        "format": number_format, "files_from": source, "phases": phases, "total": total,
        "peak_bytes": max(start["peak_bytes"] or 0 for start in starts) or None,
        "disturbed": few + disturbances({"total": total}, {"others_cpus": others}),
    }  # fmt: skip


def _prepare_cache(model: Path, drop: bool) -> bool:
    """Put the weights into the system's file cache, or out of it; False where the system offers no way out."""
    if drop and not hasattr(os, "posix_fadvise"):
        return False
    for path in [*model.glob("*.safetensors"), *model.glob("*.bin")]:
        with open(path, "rb") as file:
            if drop:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass
    return True
