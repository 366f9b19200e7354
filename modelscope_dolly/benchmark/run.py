"""`dolly bench`: how fast, beside what this machine can do at best and beside other engines on the same weights.

Figures are medians of at least three repeats behind a warm-up, unless fewer are asked for; a row that something else
disturbed says so.
"""

from __future__ import annotations

import datetime
import math
import os
import subprocess
import sys
from pathlib import Path

from ..errors import DollyError, SettingError
from ..hardware import DTYPES, free_memory, gigabytes
from ..plan import needs
from . import limits, peers
from .limits import disturbances, spread
from .options import ENGINES, BenchSettings
from .process import Bench, progress


def bench(settings: BenchSettings, found: dict | None = None) -> dict:
    """Measure what the settings ask for.

    Args:
        settings: the checked flags.
        found: is filled as figures come in, so that those of a run that is stopped are not lost.

    Returns:
        command, date, machine, settings, limits; then `rows` and `missing` (speed), `mixed`, `cold`, `lookup` or
        `quality`. Seconds and bytes unless a name says otherwise.

    Raises:
        DollyError: our own engine cannot do it, or a setting is wrong. A peer that fails has an `error` in its row.
    """
    if settings.quality:
        from .quality import compare

        return {**_record(settings), "quality": compare(settings)}
    run, found = Bench(settings), {} if found is None else found
    try:
        with run.weights():
            found |= {**_record(settings), "machine": limits.machine(run.device, run.threads)}
            found["dtypes"], found["device"] = list(run.dtypes), str(run.device)
            if settings.cold:
                found["cold"] = cold(run)
            elif settings.mixed:
                found["mixed"] = mixed(run)
            elif settings.lookup:
                found["lookup"] = lookup(run)
            else:
                found["limits"] = measure_limits(run)
                speed(run, found)
            return found
    finally:
        progress(None)


def _record(settings: BenchSettings) -> dict:
    return {
        "command": " ".join(["dolly", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": vars(settings).copy() | {"peer_python": None},
    }


def measure_limits(run: Bench) -> dict:
    """Bandwidth in bytes/s, and operations/s of torch's matrix product in each number type."""
    import torch

    torch.set_num_threads(run.threads)
    progress("the machine's limit: bandwidth")
    found: dict = {"bandwidth": limits.read_bandwidth(run.device), "matrix": {}}
    for name in run.dtypes:
        progress(f"the machine's limit: matrix product in {name}")
        found["matrix"][name] = limits.matrix_peak(run.device, DTYPES[name])
    found["disturbed"] = disturbances({"bandwidth": found["bandwidth"], **found["matrix"]}, {})
    return found


def speed(run: Bench, found: dict) -> None:
    """`rows`, one per engine, format and batch, and `missing`, the peers that are not there with the reason."""
    jobs, found["missing"] = _jobs(run)
    rows = found["rows"] = []
    prompts = {str(batch): run.prompts(batch) for batch in run.settings.batches}
    for engine, number_format, dtype, program in jobs:
        extra = {"prompts": prompts, "new_tokens": run.settings.new_tokens, "dtype": dtype}
        if engine == "llamacpp":
            extra |= {"program": program, "gguf": run.settings.gguf}
        try:
            if engine != "dolly":
                _check_memory(run, engine, dtype)
            result = run.child(run.job(engine, number_format, **extra), _interpreter(engine, program))
        except DollyError as error:
            if engine == "dolly":
                raise
            rows.append({"engine": engine, "format": number_format, "error": str(error)})
            continue
        rows += [_row(run, engine, number_format, one, result, found["limits"]) for one in result["rows"]]
        compare(rows, run.dtypes[0])
    for row in rows:
        row.pop("answers", None)


def _jobs(run: Bench) -> tuple[list[tuple[str, str, str, str]], dict[str, str]]:
    """(engine, format, number type, interpreter) of all rows, ours first; and the peers that are missing."""
    jobs = [("dolly", name, dtype, sys.executable) for name, dtype in run.formats()]
    missing = {}
    for engine in run.settings.peers if run.settings.peers is not None else ENGINES:
        asked = run.settings.peers is not None
        if engine == "hf-compile" and not asked:
            continue  # minutes of compilation: only on request
        program = run.settings.peer_python.get(engine)
        reason = _missing(run, engine, program)
        if reason:
            missing[engine] = reason
            continue
        if engine == "llamacpp":
            jobs.append((engine, Path(run.settings.gguf).stem, run.dtypes[0], program))
            continue
        known = peers.FORMATS[engine]
        quantised = () if engine.startswith("hf") else tuple(name for name in run.settings.quantize if name in known)
        wanted = quantised or [name for name in run.dtypes if name in known] or known[:1]
        jobs += [(engine, name, name, program) for name in wanted]
    return jobs, missing


def _missing(run: Bench, engine: str, program: str | None) -> str | None:
    """Why a peer cannot run here; None if it can."""
    if engine == "llamacpp":
        if program is None or run.settings.gguf is None:
            return "give --peer-python llamacpp=/path/llama-batched-bench and --gguf FILE"
        return None
    progress(f"looking for {engine}")
    probe = [program, peers.__file__, f'{{"engine": "{engine}", "probe": true}}']
    if subprocess.run(probe, capture_output=True).returncode == 0:
        return None
    return f"not installed for {program}; install it there, or give --peer-python {engine}=/path/python"


def _interpreter(engine: str, program: str) -> str:
    return sys.executable if engine == "llamacpp" else program


def _check_memory(run: Bench, engine: str, dtype: str) -> None:
    """A peer that does not fit would be killed by the system, and perhaps something else with it."""
    if run.device.type != "cpu" or engine == "llamacpp":
        return
    need = next((row.weights for row in needs(run.config) if row.format == dtype.replace("fp16", "bf16")), 0)
    if need > (free := free_memory()):
        raise DollyError(f"the weights need {gigabytes(need)} in {dtype}, {gigabytes(free)} are free")


def _row(run: Bench, engine: str, number_format: str, one: dict, result: dict, limit: dict) -> dict:
    """Figures of one batch, and their shares of the limit, which is the best of its repeats: it is what can be had."""
    batch, step, first = one["batch"], spread(one["step_s"]), spread(one["first_token_s"])
    prompt_tokens = batch * run.settings.prompt_tokens
    row = {
        "engine": engine, "format": number_format, "batch": batch, "version": result.get("version"),
        "load_s": result.get("load_s"), "load_peak_bytes": result.get("load_peak_bytes"),
        "peak_bytes": result.get("peak_bytes"), "first_token_s": first, "step_s": step,
        "prefill_tokens_per_s": prompt_tokens / first["median"], "tokens_per_s": batch / step["median"],
        "answers": one.get("answers"), "disturbed": disturbances({"first token": first, "step": step}, result),
    }  # fmt: skip
    if engine == "llamacpp":
        # a share of the file: all of it but the embedding is read at each step
        linear = limits.linear_weights(run.config)
        table = run.config.vocab_size * run.config.hidden_size
        size = Path(run.settings.gguf).stat().st_size * linear / (linear + table)
    else:
        size = limits.bytes_per_step(run.config, number_format)
    row["bytes_per_step"] = size
    row["share_of_bandwidth"] = size / limit["bandwidth"]["max"] / step["median"]
    peak = limit["matrix"].get(number_format)
    if peak:
        work = 2 * limits.linear_weights(run.config) * prompt_tokens
        row["share_of_matrix_peak"] = work / first["median"] / peak["max"]
    return row


def compare(rows: list[dict], dtype: str) -> None:
    """Add the ratios to transformers' eager row of the same batch in the yardstick's number type, and token agreement.

    `times_hf`, `prefill_times_hf`: above 1 is faster. `same_tokens`: share of each answer's tokens before the first one
    that differs from transformers'.
    """
    measured = [row for row in rows if "error" not in row]
    for row in measured:
        hf = [one for one in measured if one["engine"] == "hf" and one["batch"] == row["batch"]]
        hf.sort(key=lambda one: one["format"] != dtype)
        if not hf:
            continue
        row["yardstick"] = hf[0]["format"]
        row["times_hf"] = row["tokens_per_s"] / hf[0]["tokens_per_s"]
        row["prefill_times_hf"] = row["prefill_tokens_per_s"] / hf[0]["prefill_tokens_per_s"]
        if row.get("answers"):
            row["same_tokens"] = same_tokens(row["answers"], hf[0]["answers"])


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    shares = []
    for one, other in zip(ours, theirs, strict=True):
        equal = [a == b for a, b in zip(one, other, strict=False)]
        shares.append((equal.index(False) if False in equal else len(equal)) / max(1, len(other)))
    return math.fsum(shares) / len(shares)


def answer_lengths(run: Bench) -> list[int]:
    """Of the --mixed requests: from 5 to --new-tokens, each doubling as likely as the next, as dolly's answers are."""
    low, high = math.log(min(5, run.settings.new_tokens)), math.log(run.settings.new_tokens)
    return [round(math.exp(run.rng.uniform(low, high))) for _ in range(run.settings.mixed)]


def mixed(run: Bench) -> dict:
    """Requests per second and the share of slot steps that made a wanted token: our slots, HF's static batches."""
    lengths = answer_lengths(run)
    requests = [(run.prompts(1)[0], length) for length in lengths]
    extra = {"requests": requests, "slots": run.settings.slots}
    jobs, missing = _jobs(run)
    rows = []
    for engine, number_format, dtype, program in jobs:
        if engine not in ("dolly", "hf", "hf-compile"):
            continue
        result = run.child(run.job(engine, number_format, dtype=dtype, **extra), program)
        seconds = spread(result["seconds"])
        rows.append({
            "engine": engine, "format": number_format, "seconds": seconds, "peak_bytes": result["peak_bytes"],
            "requests_per_s": len(requests) / seconds["median"],
            "tokens_per_s": result["useful_steps"] / seconds["median"],
            "useful_share": result["useful_steps"] / result["slot_steps"],
            "disturbed": disturbances({"time": seconds}, result),
        })  # fmt: skip
    yardstick = next((row for row in rows if row["engine"] == "hf"), None)
    for row in rows:
        if yardstick:
            row["times_hf"] = row["requests_per_s"] / yardstick["requests_per_s"]
    return {"lengths": lengths, "slots": run.settings.slots, "rows": rows, "missing": missing}


def cold(run: Bench) -> list[dict]:
    """Start to first token by phase, from the system's file cache and from disk; each repeat is a new process."""
    rows = []
    for number_format, dtype in run.formats():
        for source in ("memory", "disk"):
            starts = []
            for number in range(run.settings.repeats):
                progress(f"dolly {number_format}: start {number + 1} of {run.settings.repeats}, files from {source}")
                if not _prepare_cache(run.model, drop=source == "disk"):
                    break
                starts.append(run.child(run.job("dolly", number_format, dtype=dtype, prompt=run.prompts(1)[0])))
            if starts:
                rows.append(_cold_row(number_format, source, starts))
    return rows


def _cold_row(number_format: str, source: str, starts: list[dict]) -> dict:
    phases = {name: spread([one["phases"][name] for one in starts]) for name in starts[0]["phases"]}
    total = spread([sum(one["phases"].values()) for one in starts])
    others = max(one["others_cpus"] for one in starts)
    return {
        "format": number_format, "files_from": source, "phases": phases, "total": total,
        "peak_bytes": max(one["peak_bytes"] for one in starts),
        "disturbed": disturbances({"total": total}, {"others_cpus": others}),
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


def lookup(run: Bench) -> dict:
    """Guessing from the prompt against plain decoding, on real text: see lookup.py."""
    if not Path(run.settings.data).is_file():
        raise SettingError(f"--data {run.settings.data}: not a file")
    from .lookup import measure

    return measure(run)
