"""`dolly bench --callers`: threads with one question each beside one list of them; the longest pause of a stream.

Both ask the same engine for the same greedy answers, in turn, in one process, so that their ratio is free of what
changes between runs. The pause is that of a running answer while the engine reads a long prompt of somebody else.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from typing import TYPE_CHECKING

from modelscope_dolly.benchmark import peers
from modelscope_dolly.benchmark.repeats import disturbances, spread

if TYPE_CHECKING:
    from modelscope_dolly.benchmark.bench_run import BenchRun
    from modelscope_dolly.engine.engine import Engine

#: Tokens of the long prompt, and new ones of the answer that runs beside it.
LONG_PROMPT, BESIDE = 2000, 40


def measure(run: BenchRun) -> None:
    """`callers`: `rows`, one for each format and number of callers, and `pauses`, one for each format. Seconds."""
    sizes = run.settings.callers
    rows: list[dict] = []
    pauses: list[dict] = []
    run.results["callers"] = {"rows": rows, "pauses": pauses}
    run.expect(variant.format for variant in run.variants())
    questions = [run.prompt() for _ in range(max(sizes))]
    long_prompt = run.prompt(LONG_PROMPT)
    for variant in run.variants():
        job = {"callers": list(sizes), "questions": questions, "new_tokens": run.settings.new_tokens}
        result = run.child(variant, **job, long_prompt=long_prompt)
        for timing in result["rows"]:
            rows.append(_row(variant.format, timing, run.settings.new_tokens, result))
        pauses.append({"format": variant.format, **{name: spread(result["pause"][name]) for name in result["pause"]}})
        run.measured([variant.format])


def _row(number_format: str, timing: dict, new_tokens: int, result: dict) -> dict:
    threads, together = spread(timing["threads_s"]), spread(timing["list_s"])
    tokens = timing["callers"] * new_tokens
    ratios = [a / b for a, b in zip(timing["list_s"], timing["threads_s"], strict=True)]
    return {
        "format": number_format, "callers": timing["callers"], "threads_s": threads, "list_s": together,
        "threads_tokens_per_s": tokens / threads["median"], "list_tokens_per_s": tokens / together["median"],
        "share": statistics.median(ratios), "disturbed": disturbances({"threads": threads, "list": together}, result),
    }  # fmt: skip


def run_callers(job: dict) -> dict:
    """In the child."""
    from modelscope_dolly.benchmark.own_engine import load_engine

    engine, rows = load_engine(job), []
    for count in job["callers"]:
        questions = [(ids, job["new_tokens"]) for ids in job["questions"][:count]]
        row: dict = {"callers": count, "threads_s": [], "list_s": []}
        for number in range(job["repeats"] + 1):
            peers.say(f"{count} callers: {number} of {job['repeats']}")
            seconds = _list_seconds(engine, questions), _thread_seconds(engine, questions)
            if number:  # the first one warms up
                row["list_s"].append(seconds[0])
                row["threads_s"].append(seconds[1])
        rows.append(row)
    pause: dict[str, list[float]] = {"step_s": [], "longest_s": [], "prompt_s": []}
    for number in range(job["repeats"]):
        peers.say(f"beside a long prompt: {number + 1} of {job['repeats']}")
        for name, seconds in _pause(engine, job["questions"][0], job["long_prompt"]).items():
            pause[name].append(seconds)
    return {"rows": rows, "pause": pause}


def _list_seconds(engine: Engine, questions: list[tuple[list[int], int]]) -> float:
    from modelscope_dolly.benchmark.own_engine import answer

    return answer(engine, questions, len(questions)).seconds


def _thread_seconds(engine: Engine, questions: list[tuple[list[int], int]]) -> float:
    from modelscope_dolly.benchmark.own_engine import answer

    threads = [threading.Thread(target=answer, args=(engine, [one], 1)) for one in questions]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun


def _pause(engine: Engine, question: list[int], long_prompt: list[int]) -> dict[str, float]:
    """Seconds of the longest pause between two tokens of an answer while another thread's long prompt is read."""
    from modelscope_dolly.benchmark.own_engine import answer
    from modelscope_dolly.engine.sampling import Sampling
    from modelscope_dolly.engine.sequence import Request

    moments: list[float] = []
    prompt_seconds: list[float] = []

    def ask() -> None:
        prompt_seconds.append(answer(engine, [(long_prompt, 1)], 1).seconds)

    other = threading.Thread(target=ask)
    for _ in engine.run([Request(question, BESIDE, Sampling(do_sample=False))]):
        moments.append(time.perf_counter())
        if len(moments) == BESIDE // 4:
            other.start()
    other.join()
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    before = gaps[: BESIDE // 4 - 1]
    return {"step_s": statistics.median(before), "longest_s": max(gaps), "prompt_s": prompt_seconds[0]}
