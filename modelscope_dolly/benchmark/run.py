"""`dolly bench`: how fast, beside what this machine can do at best and beside other engines on the same weights.

Figures are medians of at least three repeats behind a warm-up, unless fewer are asked for; a row that something else
disturbed says so.
"""

from __future__ import annotations

import datetime
import math
import subprocess
import sys
from pathlib import Path

from modelscope_dolly.benchmark import limits, peers
from modelscope_dolly.benchmark.limits import disturbances, spread
from modelscope_dolly.benchmark.options import ENGINES, BenchSettings
from modelscope_dolly.benchmark.process import Bench, progress
from modelscope_dolly.checkpoint.memory import FORMATS, weight_bytes
from modelscope_dolly.errors import DollyError
from modelscope_dolly.files import gigabytes
from modelscope_dolly.hardware import free_memory


def bench(settings: BenchSettings, found: dict | None = None) -> dict:
    """Measure what the settings ask for.

    Args:
        settings: the checked flags.
        found: is filled as figures come in, so that those of a run that is stopped are not lost.

    Returns:
        command, date, machine, settings, limits; then `rows` and `missing` (speed), `mixed`, `cold`, `lookup`, `draft`
        or `quality`. Seconds and bytes unless a name says otherwise.

    Raises:
        DollyError: our own engine cannot do it, or a setting is wrong. A peer that fails has an `error` in its row.
    """
    run = Bench(settings, found)
    run.found |= _record(settings)
    try:
        if settings.quality:
            from modelscope_dolly.benchmark.quality import compare as compare_quality

            compare_quality(run)
        else:
            with run.weights():
                run.found |= {
                    "machine": limits.machine(run.device, run.threads), "dtypes": list(run.dtypes),
                    "device": str(run.device),
                }  # fmt: skip
                _mode(run)
        assert not run.found.pop("not_measured", None), "something was not measured, and nothing said so"
        return run.found
    finally:
        progress(None)


def _mode(run: Bench) -> None:
    if run.settings.cold:
        from modelscope_dolly.benchmark.start import measure as cold

        cold(run)
    elif run.settings.mixed:
        mixed(run)
    elif run.settings.lookup:
        from modelscope_dolly.benchmark.lookup import measure as lookup

        lookup(run)
    elif run.settings.draft:
        from modelscope_dolly.benchmark.drafting import measure as draft

        draft(run)
    else:
        speed(run)


def figures(found: dict) -> bool:
    """Whether a run that ended early has measured anything."""
    rows = (found, *(found.get(mode, {}) for mode in ("mixed", "cold", "lookup", "draft", "quality")))
    return any(part.get("rows") for part in rows)


def _record(settings: BenchSettings) -> dict:
    return {
        "command": " ".join(["dolly", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": vars(settings).copy() | {"peer_python": None},
    }


def measure_limits(run: Bench) -> dict:
    """What limits.run_limits finds, in a process of its own: on a GPU its memory is then free again."""
    found = run.child(run.job("the machine's", "limit", limits=list(run.dtypes)))
    named = {"bandwidth": found["bandwidth"], **found["matrix"]}
    return {**{name: found[name] for name in ("bandwidth", "matrix")}, "disturbed": disturbances(named, found)}


def speed(run: Bench) -> None:
    """`limits`; `rows`, one per engine, format and batch; `missing`, the peers that are not there, and why."""
    run.found["limits"] = measure_limits(run)
    jobs, run.found["missing"] = peer_jobs(run)
    rows = run.found["rows"] = []
    batches = run.settings.batches
    run.expect(_name(engine, name, batch) for engine, name, _, _ in jobs for batch in batches)
    prompts = {str(batch): run.prompts(batch) for batch in batches}
    try:
        _speed_rows(run, jobs, prompts)
    finally:
        for row in rows:
            row.pop("answers", None)


def _speed_rows(run: Bench, jobs: list[tuple[str, str, str, str]], prompts: dict[str, list[list[int]]]) -> None:
    rows = run.found["rows"]
    for engine, number_format, dtype, program in jobs:
        extra = {"prompts": prompts, "new_tokens": run.settings.new_tokens, "dtype": dtype}
        if engine == "llamacpp":
            extra |= {"program": program, "gguf": run.settings.gguf}
        before = list(rows)

        def keep(result: dict, before: list = before, engine: str = engine, number_format: str = number_format) -> None:
            rows[:] = [*before, *(_row(run, engine, number_format, one, result) for one in result["rows"])]
            compare(rows, run.dtypes[0])
            run.has(_name(engine, number_format, one["batch"]) for one in result["rows"])

        try:
            if engine != "dolly":
                _check_memory(run, engine, dtype)
            keep(run.child(run.job(engine, number_format, **extra), _interpreter(engine, program), keep))
        except DollyError as error:
            if engine == "dolly":
                raise
            rows.append({"engine": engine, "format": number_format, "error": str(error)})
            run.has(_name(engine, number_format, batch) for batch in run.settings.batches)


def _name(engine: str, number_format: str, batch: int) -> str:
    return f"{engine} {number_format} at batch {batch}"


def peer_jobs(run: Bench) -> tuple[list[tuple[str, str, str, str]], dict[str, str]]:
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
        if run.device.type == "cuda":
            known = (*peers.GPU_FORMATS.get(engine, ()), *known)
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
    if engine == "hf-compile" and run.device.type == "cpu":
        return "its steps are compiled on a GPU only"
    progress(f"looking for {engine}")
    probe = [program, peers.__file__, f'{{"engine": "{engine}", "probe": true}}']
    if subprocess.run(probe, capture_output=True).returncode == 0:
        return None
    return f"not installed for {program}; install it there, or give --peer-python {engine}=/path/python"


def _interpreter(engine: str, program: str) -> str:
    return sys.executable if engine == "llamacpp" else program


def _check_memory(run: Bench, engine: str, number_format: str) -> None:
    """A peer that does not fit would be killed by the system, and perhaps something else with it.

    On a GPU it ends with an error of its own, and nothing else does.
    """
    if run.device.type != "cpu" or engine == "llamacpp":
        return
    if (need := weight_bytes(run.config, *FORMATS[number_format.replace("fp16", "bf16")])) > (free := free_memory()):
        raise DollyError(f"the weights need {gigabytes(need)} in {number_format}, {gigabytes(free)} are free")


def _row(run: Bench, engine: str, number_format: str, one: dict, result: dict) -> dict:
    """Figures of one batch, and their shares of the limit, which is the best of its repeats: it is what can be had."""
    limit = run.found["limits"]
    batch, step, first = one["batch"], spread(one["step_s"]), spread(one["first_token_s"])
    prompt_tokens = batch * run.settings.prompt_tokens
    row = {
        "engine": engine, "format": number_format, "held": result.get("held"), "batch": batch,
        **{name: result.get(name) for name in ("version", "load_s", "load_peak_bytes", "peak_bytes")},
        "first_token_s": first, "step_s": step,
        "prefill_tokens_per_s": prompt_tokens / first["median"], "tokens_per_s": batch / step["median"],
        "answers": one.get("answers"), "disturbed": disturbances({"first token": first, "step": step}, result),
    }  # fmt: skip
    if engine == "llamacpp":
        # a share of the file: all of it but the embedding is read at each step
        linear = limits.linear_weights(run.config)
        table = run.config.vocab_size * run.config.hidden_size
        size = Path(run.settings.gguf).stat().st_size * linear / (linear + table)
    else:
        size = limits.bytes_per_step(run.config, number_format, result.get("held"))
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


def mixed(run: Bench) -> None:
    """`mixed`: requests per second, and the share of slot steps that made a wanted token.

    Our slots beside the static batches of transformers.
    """
    lengths = answer_lengths(run)
    requests = [(run.prompts(1)[0], length) for length in lengths]
    extra = {"requests": requests, "slots": run.settings.slots}
    jobs, missing = peer_jobs(run)
    jobs = [job for job in jobs if job[0] in ("dolly", "hf", "hf-compile")]
    rows: list[dict] = []
    run.found["mixed"] = {"lengths": lengths, "slots": run.settings.slots, "rows": rows, "missing": missing}
    run.expect(f"{engine} {number_format}" for engine, number_format, _, _ in jobs)
    for engine, number_format, dtype, program in jobs:
        result = run.child(run.job(engine, number_format, dtype=dtype, **extra), program)
        seconds = spread(result["seconds"])
        rows.append({
            "engine": engine, "format": number_format, "seconds": seconds, "peak_bytes": result["peak_bytes"],
            "requests_per_s": len(requests) / seconds["median"],
            "tokens_per_s": result["useful_steps"] / seconds["median"],
            "useful_share": result["useful_steps"] / result["slot_steps"],
            "disturbed": disturbances({"time": seconds}, result),
        })  # fmt: skip
        run.has([f"{engine} {number_format}"])
        yardstick = next((row for row in rows if row["engine"] == "hf"), None)
        for row in rows if yardstick else ():
            row["times_hf"] = row["requests_per_s"] / yardstick["requests_per_s"]
