"""Runs what the scheduler chose: a prefill, a decode step, the verification of draft tokens; and draws the new tokens.

A verified step draws from each row of logits with the sequence's own sampler, as ever, and ends at the first token that
is not the draft token: so draft tokens change the speed and never the answer. Keys and values of rejected ones are
overwritten by the next step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.scheduler import Batch
from modelscope_dolly.engine.sequence import RunStats, Sequence
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.engine.step_timer import StepTimer
from modelscope_dolly.errors import HardwareError
from modelscope_dolly.hardware import dtype_name


class CapturedSteps(Protocol):
    """Decode steps over one cache that run without the host; see cuda_graphs.py."""

    cache: KVCache

    def replay(self, sequences: list[Sequence], timer: StepTimer, one_step: bool) -> list[list[int]] | None:
        """The next ids of each sequence, sequence i in slot i; None where nothing can be captured."""


class StepCapture(Protocol):
    """Captures decode steps of one network.

    Attributes:
        cache_step: cache lengths are multiples of this, so that runs of about the same length share captured steps.
    """

    cache_step: int

    def steps(self, slots: int, length: int) -> AbstractContextManager[CapturedSteps]:
        """For one run, over a cache of at least that size."""


@dataclass
class Runner:
    """The steps of one run.

    Attributes:
        net: the weights; runs share them, and nothing writes them.
        device: where token ids go in.
        cache: keys and values of this run.
        timer: of decode steps.
        stats: counts decode steps.
        lock: one step at a time. Threads take turns instead of fighting for the same cores or the same stream, and
            accelerate's hooks, which swap weights of an offloaded layer in and out, are not thread-safe.
        captured: decode steps that run without the host.
    """

    net: GPTNeoX
    device: torch.device
    cache: KVCache
    timer: StepTimer
    stats: RunStats
    lock: threading.Lock
    captured: CapturedSteps | None = None

    def run(self, batch: Batch) -> list[Iterator[int]]:
        """Take the step. For each sequence its next ids, which are drawn as they are asked for.

        Raises:
            HardwareError: out of memory, or the network's output is not finite.
        """
        if self.captured is not None and not batch.prefill and not any(batch.draft):
            replayed = self._replay(batch)
            if replayed is not None:
                return replayed
        tokens, step = _step_input(batch)
        rows = self.forward(self.net, tokens, step, self.cache, self.timer).split(
            [1 + len(draft) for draft in batch.draft]
        )
        self.stats.decode_steps += not batch.prefill
        return [_draw(*drawn) for drawn in zip(batch.sequences, rows, batch.draft, strict=True)]

    def forward(
        self, net: GPTNeoX, tokens: list[int], step: StepInput, cache: KVCache, timer: StepTimer
    ) -> torch.Tensor:
        """One pass through `net`, which may be a draft network -> logits [N', V], see GPTNeoX.forward."""
        # inference_mode stays inside the step: around a `yield` it would leak into the caller's code.
        with self._alone():
            begun = time.perf_counter()
            logits = net(torch.tensor(tokens, device=self.device), step, cache)
            check_finite(bool(torch.isfinite(logits).all()), logits, self.device)  # waits for the device
            if step.spans is None:
                timer.add(len(tokens), time.perf_counter() - begun)
            return logits

    def _replay(self, batch: Batch) -> list[Iterator[int]] | None:
        assert self.captured is not None
        with self._alone():
            ids = self.captured.replay(batch.sequences, self.timer, batch.one_step)
        if ids is None:
            return None
        self.stats.decode_steps += len(ids[0])
        return [_drawn(*pair) for pair in zip(batch.sequences, ids, strict=True)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Around a step; says what took the memory if it runs out."""
        try:
            with self.lock, torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            raise HardwareError(
                f"{self.device}: out of memory with {self.cache.slots} sequences of up to {self.cache.length} tokens; "
                "use a smaller batch_size or max_new_tokens, or a smaller dtype"
            ) from error


def _step_input(batch: Batch) -> tuple[list[int], StepInput]:
    """Tokens of the step, and where they belong."""
    if batch.prefill:
        prompts = [sequence.request.ids for sequence in batch.sequences]
        return [id for ids in prompts for id in ids], StepInput.prefill([len(ids) for ids in prompts], batch.first_slot)
    positions = [len(sequence.ids) - 1 for sequence in batch.sequences]
    tokens = [
        id for sequence, draft in zip(batch.sequences, batch.draft, strict=True) for id in (sequence.ids[-1], *draft)
    ]
    if not any(batch.draft):
        return tokens, StepInput.decode(positions)
    counts = [1 + len(draft) for draft in batch.draft]
    return tokens, StepInput.verify(list(zip(range(len(positions)), positions, counts, strict=True)))


def _draw(sequence: Sequence, logits: torch.Tensor, draft: list[int]) -> Iterator[int]:
    """Ids from logits [1 + draft tokens, V] until one is not the draft token."""
    for row, proposed in zip(logits, (*draft, None), strict=True):
        id = sequence.sampler.sample(row)
        yield id
        if id != proposed:
            return


def _drawn(sequence: Sequence, ids: list[int]) -> Iterator[int]:
    """Ids that the device has drawn."""
    for id in ids:
        sequence.sampler.advance(id)
        yield id


def check_finite(finite: bool, logits: torch.Tensor, device: torch.device) -> None:
    """Raises HardwareError for logits that are infinite or no numbers."""
    if not finite:
        wider = {torch.float16: "dtype='bf16' or 'fp32'", torch.bfloat16: "dtype='fp32'"}.get(logits.dtype)
        raise HardwareError(
            f"the network's output is not finite in {dtype_name(logits.dtype)} on {device}: the weights are damaged "
            f"(dolly check){f' or overflow in this type; use {wider}' if wider else ''}"
        )
