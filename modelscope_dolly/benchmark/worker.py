"""Our own engine's part of `dolly bench`: runs in a process of its own, as the peers do, and speaks as they do.

python -m modelscope_dolly.benchmark.worker '{"engine": "dolly", "model": "DIR", ...}'
"""

from __future__ import annotations

import json
import sys
import time

SPAWNED = time.time()  # for a process that is not told when it was started

from typing import TYPE_CHECKING, Any  # noqa: E402

from modelscope_dolly.benchmark import peers  # noqa: E402
from modelscope_dolly.errors import DollyError  # noqa: E402

if TYPE_CHECKING:
    from modelscope_dolly.engine.engine import Engine, Request
    from modelscope_dolly.load import Dolly


def load_dolly(job: dict) -> Dolly:
    """The checkpoint in the job's format: a number type, or int8 or int4."""
    from modelscope_dolly.load import load

    more = {"quantize": job["format"] if job["format"] in ("int8", "int4") else None, "draft": job.get("draft")}
    return load(job["model"], job["device"], job["dtype"], threads=job["threads"], **more)


def loader(job: dict) -> peers.Generate:
    """As the loaders of peers.py. Sets job["held"], see limits.bytes_per_step."""
    from modelscope_dolly.engine.engine import Request
    from modelscope_dolly.engine.sampling import Sampling
    from modelscope_dolly.kernels.quantized_linear import BF16Linear

    engine = load_dolly(job).responder.engine
    job["held"] = "bf16" if isinstance(engine.net.embed_out, BF16Linear) else None

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        requests = [Request(ids, new, Sampling(do_sample=False)) for ids in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        elapsed = [0.0] * new
        begin = time.perf_counter()
        for token in engine.run(requests, slots=len(prompts)):
            elapsed[len(answers[token.index])] = time.perf_counter() - begin  # of the last answer of the batch
            answers[token.index].append(token.id)
        return answers, elapsed

    return generate


def run_mixed(job: dict) -> dict:
    """All requests through the slots, each refilled when its answer ends."""
    from modelscope_dolly.engine.engine import Request, RunStats
    from modelscope_dolly.engine.sampling import Sampling

    peers.peak(job, reset=True)
    engine = load_dolly(job).responder.engine
    requests = [Request(ids, new, Sampling(do_sample=False)) for ids, new in job["requests"]]
    slots = min(job["slots"], len(requests))
    if peers.on_gpu(job):  # what is recorded there is for one size of cache and for each number of answers
        run_timed(engine, requests, slots, RunStats())
    else:
        run_timed(engine, [Request(one.ids, 2, one.sampling) for one in requests[:slots]], slots, RunStats())
    seconds = []
    for number in range(job["repeats"]):
        peers.say(f"repeat {number + 1} of {job['repeats']}")
        stats = RunStats()
        seconds.append(run_timed(engine, requests, slots, stats))
    useful = sum(one.max_new_tokens for one in requests)
    # the first token of each answer comes with its prompt; every other step works for all slots, used or not
    slot_steps = len(requests) + stats.decode_steps * slots
    return {
        "seconds": seconds,
        "slot_steps": slot_steps,
        "useful_steps": useful,
        "peak_bytes": peers.peak(job),
    }


def run_timed(engine: Engine, requests: list[Request], slots: int, stats: Any) -> float:
    begin = time.perf_counter()
    for _ in engine.run(requests, slots, stats):
        pass
    return time.perf_counter() - begin


def run_cold(job: dict) -> dict:
    """One start: seconds of each phase from the moment the process was asked for to its first token.

    The phases of load() are timed by wrapping the two functions it is made of.
    """
    # load() imports these when it first needs them; here they count as import
    from transformers import GPTNeoXConfig, PreTrainedTokenizerFast  # noqa: F401

    from modelscope_dolly import load as loading
    from modelscope_dolly.engine.engine import Request
    from modelscope_dolly.engine.sampling import Sampling

    phases = {"import": time.time() - job.get("spawned", SPAWNED), "check": 0.0, "read_and_place": 0.0}

    def timed(name: str, work: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*arguments, **keywords)
            finally:
                phases[name] += time.perf_counter() - begin

        return run

    loading.open_checkpoint = timed("check", loading.open_checkpoint)
    loading.load_network = timed("read_and_place", loading.load_network)
    begin = time.perf_counter()
    engine = load_dolly(job).responder.engine
    phases["rest_of_load"] = time.perf_counter() - begin - phases["check"] - phases["read_and_place"]
    begin = time.perf_counter()
    engine.generate([Request(job["prompt"], 1, Sampling(do_sample=False))])
    phases["first_step"] = time.perf_counter() - begin
    return {"phases": phases, "peak_bytes": peers.peak(job)}


def main() -> int:
    job = peers.read_job()
    try:
        if "limits" in job:
            from modelscope_dolly.benchmark.limits import run_limits

            result = run_limits(job)
        elif "prompt" in job:
            result = run_cold(job)
        elif "requests" in job:
            result = run_mixed(job)
        elif "lookup" in job:
            from modelscope_dolly.benchmark.lookup import run_lookup

            result = run_lookup(load_dolly(job).responder.engine, job)
        elif "draft" in job:
            from modelscope_dolly.benchmark.drafting import run_draft

            result = run_draft(load_dolly(job), job)
        else:
            result = peers.run(job, loader)
    except DollyError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"result": result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
