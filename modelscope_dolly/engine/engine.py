"""The engine: prompts go in as requests, tokens come out as they are drawn. A list and a stream are the same loop.

Each turn of the loop: the scheduler chooses what runs next (scheduler.py), the runner computes it and draws the tokens
(runner.py), the sequences take them. The state of a run belongs to that run; runs at the same time share the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.runner import Runner, StepCapture
from modelscope_dolly.engine.scheduler import Scheduler, Speculation
from modelscope_dolly.engine.sequence import Request, RunStats, Token
from modelscope_dolly.engine.step_timer import StepTimer
from modelscope_dolly.errors import PromptError

#: Cache lengths are rounded up to this, so that runs of about the same length reuse the allocator's blocks.
CACHE_STEP = 64


@dataclass
class Engine:
    """Continues token ids with a network. Safe to use from several threads.

    Attributes:
        net: the weights.
        device: where token ids go in.
        window: positions the network was trained for (2048).
        speculation: proposes draft tokens in a run, with the run's runner; without it none are verified.
        capture: of decode steps, for a network that lies on one CUDA device.
        timer: of decode steps, over all runs.
    """

    net: GPTNeoX
    device: torch.device
    window: int
    speculation: Callable[[Runner], Speculation] | None = None
    capture: StepCapture | None = None
    timer: StepTimer = field(default_factory=StepTimer)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def generate(self, requests: list[Request], slots: int = 1) -> list[list[int]]:
        """The new ids of each request, in order, stop ids included."""
        answers: list[list[int]] = [[] for _ in requests]
        for token in self.run(requests, slots):
            answers[token.index].append(token.id)
        return answers

    def run(self, requests: list[Request], slots: int = 1, stats: RunStats | None = None) -> Iterator[Token]:
        """Yield tokens as they are drawn, those of one request in order. Closing the generator ends the run.

        Args:
            requests: to be answered.
            slots: sequences that run at the same time; it changes the speed, not the tokens.
            stats: counts what is done.

        Raises:
            PromptError: a prompt is empty or does not fit the window with its new tokens.
            HardwareError: see Runner.run.
        """
        for request in requests:
            self._check(request)
        if not requests:
            return
        slots, stats = max(1, min(slots, len(requests))), stats or RunStats()
        longest = max(len(request.ids) + request.max_new_tokens for request in requests)
        with self._runner(slots, longest, stats) as runner:
            scheduler = Scheduler(requests, slots, stats, self.speculation(runner) if self.speculation else None)
            while not scheduler.finished:
                batch = scheduler.schedule()
                sampled = runner.run(batch)
                yield from scheduler.postprocess(batch, sampled)
                for source, target in scheduler.release():
                    runner.cache.move(source, target)

    @contextmanager
    def _runner(self, slots: int, length: int, stats: RunStats) -> Iterator[Runner]:
        """A runner with a cache of at least `length` places."""
        step = self.capture.cache_step if self.capture else CACHE_STEP
        length = min(self.window, -(-length // step) * step)
        shared = (self.timer, stats, self._lock)
        if self.capture is None:
            yield Runner(self.net, self.device, self.net.new_cache(slots, length), *shared)
            return
        with self.capture.steps(slots, length) as captured:
            yield Runner(self.net, self.device, captured.cache, *shared, captured)

    def _check(self, request: Request) -> None:
        total = len(request.ids) + request.max_new_tokens
        if not request.ids or request.max_new_tokens < 1 or total > self.window:
            raise PromptError(
                f"a prompt of {len(request.ids)} tokens and {request.max_new_tokens} new ones do not fit the window of "
                f"{self.window}; both must be at least 1"
            )
