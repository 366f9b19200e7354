"""Our own engine's part of `dolly bench`: runs in a process of its own and speaks as the peers do (peers.py).

python -m modelscope_dolly.benchmark.worker '{"engine": "dolly", "model": "DIR", ...}'
"""

from __future__ import annotations

import json
import os
import sys
import time

from modelscope_dolly.benchmark import peers
from modelscope_dolly.errors import DollyError


def load_generate(job: dict) -> peers.Generate:
    """As the loaders of peers.py. Sets job["held"], see hardware_limits.bytes_per_step."""
    from modelscope_dolly.benchmark.own_engine import answer, held_format, load_engine

    engine = load_engine(job)
    job["held"] = held_format(engine)

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        run = answer(engine, [(ids, new) for ids in prompts], slots=len(prompts))
        return run.answers, [max(step) for step in zip(*run.token_seconds, strict=True)]

    return generate


def run_mixed(job: dict) -> dict:
    """All requests through the slots, each refilled when its answer ends."""
    from modelscope_dolly.benchmark.own_engine import answer, load_engine

    peers.peak(job, reset=True)
    engine, requests = load_engine(job), job["requests"]
    slots = min(job["slots"], len(requests))
    # on a GPU graphs are captured for one size of cache and for each number of sequences
    answer(engine, requests if peers.on_gpu(job) else [(ids, 2) for ids, _ in requests[:slots]], slots)
    seconds = []
    for number in range(job["repeats"]):
        peers.say(f"repeat {number + 1} of {job['repeats']}")
        run = answer(engine, requests, slots)
        seconds.append(run.seconds)
    return {
        "seconds": seconds, "useful_steps": sum(new for _, new in requests), "peak_bytes": peers.peak(job),
        # the first token of each answer comes with its prompt; every other step computes all slots, used or not
        "slot_steps": len(requests) + run.decode_steps * slots,
    }  # fmt: skip


def run_cold(job: dict) -> dict:
    """One start: seconds of each phase from the moment the process was asked for to its first token.

    job["cache"] takes the place of the user's cache directory, which knows what has been compared with a manifest.
    """
    os.environ["XDG_CACHE_HOME"] = job["cache"]
    from modelscope_dolly.benchmark.own_engine import answer, load_in_phases

    phases = {"import": time.time() - job["spawned"]}
    engine, loading = load_in_phases(job)
    first = answer(engine, [(job["prompt"], 1)], slots=1)
    return {"phases": {**phases, **loading, "first_step": first.seconds}, "peak_bytes": peers.peak(job)}


def run_job(job: dict) -> dict:
    if "limits" in job:
        from modelscope_dolly.benchmark.hardware_limits import run_limits

        return run_limits(job)
    if "prompt" in job:
        return run_cold(job)
    if "requests" in job:
        return run_mixed(job)
    if "clients" in job:
        from modelscope_dolly.benchmark.server_speed import run_clients

        return run_clients(job)
    if "callers" in job:
        from modelscope_dolly.benchmark.many_callers import run_callers

        return run_callers(job)
    if "lookup" in job:
        from modelscope_dolly.benchmark.prompt_lookup_speed import run_lookup

        return run_lookup(job)
    if "draft" in job:
        from modelscope_dolly.benchmark.draft_model_speed import run_draft

        return run_draft(job)
    return peers.run(job, load_generate)


def main() -> int:
    try:
        result = run_job(peers.read_job())
    except DollyError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"result": result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
