"""What the measurements ask of our own engine: timed greedy answers, answers from a script, log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modelscope_dolly import load as loading
from modelscope_dolly.checkpoint.verification import Verification
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request, RunStats
from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.kernels.quantized_linear import METHODS, BF16Linear

if TYPE_CHECKING:
    from modelscope_dolly.engine.cuda_graphs import Forward
    from modelscope_dolly.engine.engine import Engine
    from modelscope_dolly.engine.gpt_neox import GPTNeoX
    from modelscope_dolly.engine.kv_cache import KVCache


def load_model(job: dict) -> loading.Dolly:
    """The checkpoint in the job's format: a number type, or a name of `quantize=`."""
    quantize = job["format"] if job["format"] in METHODS else None
    more = {"quantize": quantize, "threads": job["threads"], "draft": job.get("draft")}
    return loading.load(job["model"], job["device"], job["dtype"], **more)


def load_engine(job: dict) -> Engine:
    return load_model(job).text_generator.engine


def load_in_phases(job: dict) -> tuple[Engine, dict[str, float]]:
    """The engine, and seconds of each phase of loading: the functions that load() is made of are wrapped.

    Weight files are hashed beside reading them; `compare` is what is left of that when they have been read.
    """
    phases = {"check": 0.0, "read_and_place": 0.0, "compare": 0.0}

    def timed(name: str, work: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments, **keywords)
            finally:
                phases[name] += time.perf_counter() - start

        return run

    loading.open_checkpoint = timed("check", loading.open_checkpoint)
    loading.load_network = timed("read_and_place", loading.load_network)
    Verification.finish = timed("compare", Verification.finish)
    start = time.perf_counter()
    engine = load_engine(job)
    phases["rest_of_load"] = time.perf_counter() - start - sum(phases.values())
    return engine, phases


def held_format(engine: Engine) -> str | None:
    """How linear weights are kept where that is not the network's number type; see hardware_limits.bytes_per_step."""
    return "bf16" if isinstance(engine.net.embed_out, BF16Linear) else None


@dataclass(frozen=True)
class TimedAnswers:
    """Greedy answers of one run of the engine."""

    answers: list[list[int]]  # ids of each request
    token_seconds: list[list[float]]  # of each request: seconds from the start to each of its tokens
    seconds: float  # of the whole run
    decode_steps: int  # forward passes behind the prompts
    decode_tokens: int  # that these passes gave
    proposed: int  # draft tokens
    accepted: int


def answer(
    engine: Engine, prompts: Sequence[tuple[list[int], int]], slots: int, prompt_lookup: bool = False
) -> TimedAnswers:
    """Answer (ids of the prompt, number of new tokens) pairs greedily, at most `slots` at once."""
    proposer = PromptLookup if prompt_lookup else None
    # A list of its own for each: the very same list would be read once.
    requests = [Request(list(ids), new, Sampling(do_sample=False), proposer=proposer) for ids, new in prompts]
    answers: list[list[int]] = [[] for _ in requests]
    moments: list[list[float]] = [[] for _ in requests]
    stats, start = RunStats(), time.perf_counter()
    for token in engine.run(requests, slots, stats):
        moments[token.index].append(time.perf_counter() - start)
        answers[token.index].append(token.id)
    seconds = time.perf_counter() - start
    return TimedAnswers(
        answers, moments, seconds, stats.decode_steps, stats.decode_tokens, stats.proposed, stats.accepted
    )


def log_probabilities(net: GPTNeoX, device: torch.device, ids: list[int], prompt_tokens: int) -> torch.Tensor:
    """Of the whole vocabulary at each token behind the prompt, given the ids before it: [tokens, V] float32, CPU."""
    with torch.inference_mode():
        logits = net(torch.tensor(ids, device=device), StepInput.verify([(0, 0, len(ids))]), net.new_cache(1, len(ids)))
        return torch.log_softmax(logits[prompt_tokens - 1 : -1].float(), dim=-1).cpu()


class ScriptedNetwork:
    """A network that computes every pass in full and then predicts the next token of a script; after its end, token 1.

    The script stays at one address on the device, so that captured graphs follow it too.
    """

    def __init__(self, engine: Engine):
        """Takes the place of the engine's network, in decode steps that may be captured, too."""
        self.net = engine.net
        self._script = torch.ones(engine.window + 1, dtype=torch.int64, device=engine.device)
        engine.net = self
        if engine.capture is not None:
            engine.capture.net = self
            engine.capture.forwards = [(name, self._scripted(forward)) for name, forward in engine.capture.forwards]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def follow(self, script: list[int]) -> None:
        """Predict these ids, those of a prompt and its answer, in the passes that follow."""
        self._script.fill_(1)
        self._script[: len(script)] = torch.tensor(script, device=self._script.device)

    def __call__(self, tokens: torch.Tensor, step: StepInput, cache: KVCache) -> torch.Tensor:
        """Logits as the network gives them, of one slot: at each wanted position the script's next token is largest."""
        logits = self.net(tokens, step, cache)
        wanted = step.logit_rows()
        positions = step.positions if wanted is None else step.positions[wanted]
        return self._predict(logits, positions.to(logits.device))

    def _scripted(self, forward: Forward) -> Forward:
        return lambda tokens, positions, cache: self._predict(forward(tokens, positions, cache), positions)

    def _predict(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return logits.clamp_(-1.0, 1.0).scatter_(1, self._script[positions + 1][:, None], 9.0)
