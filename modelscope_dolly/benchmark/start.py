"""`dolly bench --cold`: from the start of a process to its first token, by phase."""

from __future__ import annotations

import os
from pathlib import Path

from modelscope_dolly.benchmark.limits import disturbances, spread
from modelscope_dolly.benchmark.process import Bench, progress

SOURCES = ("memory", "disk")


def measure(run: Bench) -> None:
    """`cold`: a row for each format, from the system's file cache and from disk; each repeat is a new process."""
    rows: list[dict] = []
    run.found["cold"] = {"rows": rows}
    repeats = run.settings.repeats
    run.expect(_name(name, source) for name, _ in run.formats() for source in SOURCES)
    for number_format, dtype in run.formats():
        for source in SOURCES:
            before, starts = list(rows), []
            for number in range(repeats):
                progress(f"dolly {number_format}: start {number + 1} of {repeats}, files from {source}")
                if not _prepare_cache(run.model, drop=source == "disk"):
                    break
                starts.append(run.child(run.job("dolly", number_format, dtype=dtype, prompt=run.prompts(1)[0])))
                rows[:] = [*before, _row(number_format, source, starts, repeats)]
            run.has([_name(number_format, source)])


def _name(number_format: str, source: str) -> str:
    return f"{number_format} from {source}"


def _row(number_format: str, source: str, starts: list[dict], repeats: int) -> dict:
    phases = {name: spread([one["phases"][name] for one in starts]) for name in starts[0]["phases"]}
    total = spread([sum(one["phases"].values()) for one in starts])
    others = max(one["others_cpus"] for one in starts)
    few = [f"{len(starts)} of {repeats} starts"] if len(starts) < repeats else []
    return {
        "format": number_format, "files_from": source, "phases": phases, "total": total,
        "peak_bytes": max((one["peak_bytes"] or 0 for one in starts), default=0) or None,
        "disturbed": few + disturbances({"total": total}, {"others_cpus": others}),
    }  # fmt: skip


def _prepare_cache(model: Path, drop: bool) -> bool:
    """Put the weights into the system's file cache, or out of it; False where the system offers no way out."""
    if drop and not hasattr(os, "posix_fadvise"):
        return False
    for file in [*model.glob("*.safetensors"), *model.glob("*.bin")]:
        with open(file, "rb") as opened:
            if drop:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass
    return True
