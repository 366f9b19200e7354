"""`dolly bench --draft`: step times of a network and of its draft model, and the acceptance rate from which it pays.

The acceptance rate is a matter of the two models and of the text; random weights say nothing about it. So the question
is turned round: from which rate on is it faster than plain decoding? Leviathan et al. 2023 (arXiv:2211.17192, equation
1): a step that verifies k draft tokens, each accepted with probability a, gives (1 - a^(k+1)) / (1 - a) tokens on
average.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelscope_dolly.benchmark import peers
from modelscope_dolly.benchmark.bench_run import BenchRun
from modelscope_dolly.benchmark.repeats import disturbances, spread

if TYPE_CHECKING:
    from modelscope_dolly.engine.gpt_neox import GPTNeoX

#: Draft tokens that a step verifies.
LENGTHS = tuple(range(1, 9))
#: Rates for which the gain is printed.
RATES = (0.7, 0.9)


def measure(run: BenchRun) -> None:
    """`draft`: a row for each format and number of draft tokens, in seconds; `pays_from` is a rate, None: never."""
    settings = run.settings
    place = Path(settings.draft)
    if not place.is_dir():
        place = run.random_weights(settings.draft)
    rows: list[dict] = []
    run.results["draft"] = {"draft": str(settings.draft), "rows": rows}
    run.expect(variant.format for variant in run.variants())
    prompt = run.prompt()
    for variant in run.variants():
        result = run.child(variant, draft=str(place), prompt_ids=prompt, new_tokens=settings.new_tokens)
        plain, drafted = spread(result["plain_s"]), spread(result["draft_s"])
        for count in LENGTHS:
            verify = spread(result["verify_s"][str(count)])
            cost = verify["median"] + count * drafted["median"]
            rows.append({
                "format": variant.format, "guesses": count, "plain_s": plain, "draft_s": drafted, "verify_s": verify,
                "pays_from": break_even(count, cost / plain["median"]),
                "times_plain": {rate: expected_tokens(rate, count) * plain["median"] / cost for rate in RATES},
                "disturbed": disturbances({"plain": plain, "draft": drafted, "verify": verify}, result),
            })  # fmt: skip
        run.measured([variant.format])


def expected_tokens(rate: float, count: int) -> float:
    """Tokens that a step gives on average which verifies `count` draft tokens, each accepted at `rate`."""
    return count + 1 if rate == 1 else (1 - rate ** (count + 1)) / (1 - rate)


def break_even(count: int, cost: float) -> float | None:
    """The rate at which `count` draft tokens are as fast as plain decoding, where they cost `cost` plain steps."""
    if expected_tokens(1, count) < cost:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, count) < cost else (low, middle)
    return high


def run_draft(job: dict) -> dict:
    """In the child: seconds of a plain step, of a step of the draft, and of steps over 1 + 1 ... 1 + 8 tokens."""
    from modelscope_dolly.benchmark.own_engine import answer, load_engine

    engine, prompt = load_engine(job), job["prompt_ids"]
    draft, engine.speculation = engine.speculation.keywords["draft"], None
    plain = []
    for number in range(job["repeats"] + 1):
        peers.say(f"plain: {number} of {job['repeats']}")
        seconds = [answer(engine, [(prompt, count)], 1).seconds for count in (1, job["new_tokens"])]
        plain.append((seconds[1] - seconds[0]) / (job["new_tokens"] - 1))
    peers.say("the draft")
    found = {"plain_s": plain[1:], "draft_s": _step_seconds(draft.net, engine.device, prompt, 1, job["repeats"])}
    verify = {}
    for count in LENGTHS:
        peers.say(f"verifying {count} of {LENGTHS[-1]}")
        verify[str(count)] = _step_seconds(engine.net, engine.device, prompt, 1 + count, job["repeats"])
    return {**found, "verify_s": verify}


def _step_seconds(net: GPTNeoX, device: torch.device, prompt: list[int], count: int, repeats: int) -> list[float]:
    """Seconds of steps over `count` tokens behind a prompt, the first two not counted."""
    from modelscope_dolly.engine.step_input import StepInput

    cache = net.new_cache(1, len(prompt) + count)
    tokens = torch.full((count,), prompt[0], device=device)
    seconds = []
    with torch.inference_mode():
        net(torch.tensor(prompt, device=device), StepInput.verify([(0, 0, len(prompt))], last_only=True), cache)
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            bool(torch.isfinite(net(tokens, StepInput.verify([(0, len(prompt), count)]), cache)).all())  # waits for it
            seconds.append(time.perf_counter() - begin)
    return seconds[2:]
