"""Runs what the scheduler chose: a prefill, a decode step, the verification of draft tokens; and draws the new tokens.

A verified step draws from each row of logits with the sequence's own sampler, as ever, and ends at the first token that
is not the draft token: so draft tokens change the speed and never the answer. Keys and values of rejected ones are
overwritten by the next step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.kv_cache import KVCache, SavedSlot
from modelscope_dolly.engine.scheduler import KEPT, Batch, Part
from modelscope_dolly.engine.sequence import Sequence
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.engine.step_timer import StepTimer
from modelscope_dolly.errors import HardwareError
from modelscope_dolly.hardware import dtype_name, free_memory

#: Cache lengths are rounded up to this, so that requests of about the same length reuse the allocator's blocks.
CACHE_STEP = 64
#: Share of the free memory that the key/value cache may take.
CACHE_SHARE = 0.9


class StepCapture(Protocol):
    """Captures decode steps of one network, to run without the host; see cuda_graphs.py.

    Attributes:
        cache_step: cache lengths are multiples of this, so that captured steps serve requests of about the same length.
    """

    cache_step: int

    def slots(self, slots: int) -> int:
        """Slots that a cache should have, so that it is rarely resized."""

    def replay(
        self, sequences: list[Sequence], cache: KVCache, timer: StepTimer, one_step: bool
    ) -> list[list[int]] | None:
        """The next ids of each sequence, sequence i in slot i; None where nothing can be captured."""


class KeptPrompt(NamedTuple):
    """What is kept of a shared prompt: its keys and values, and the logits [1, V] of its last token."""

    cache: SavedSlot
    logits: torch.Tensor


class Runner:
    """Steps of a network over one key/value cache. Not for several threads.

    Args:
        net: the weights, which nothing writes.
        device: where token ids go in.
        timer: of decode steps.
        capture: decode steps that run without the host.
    """

    def __init__(self, net: GPTNeoX, device: torch.device, timer: StepTimer, capture: StepCapture | None = None):
        self.net, self.device, self.timer, self.capture = net, device, timer, capture
        self.cache = net.new_cache()
        self._beside: list[tuple[KVCache, int]] = []

    def add_cache(self, cache: KVCache, place_bytes: int) -> None:
        """Count the cache of another network, which is to have the slots and places of this one, and give it back too.

        Args:
            cache: resized by whoever uses it, when it is first needed.
            place_bytes: GPTNeoX.cache_bytes of that network.
        """
        self._beside.append((cache, place_bytes))

    def fits(self, slots: int, length: int) -> bool:
        """Whether there is memory for a cache of that size, and for those beside it."""
        return self._has_memory(*self._size(slots, length))

    def capacity(self, length: int) -> int:
        """How many slots of such a length there is memory for, the present cache given back."""
        caches = self._caches()
        held = sum(cache.slots * cache.length * place for cache, place in caches)
        each = self._size(1, length)[1] * sum(place for _, place in caches)
        return int(CACHE_SHARE * (free_memory(self.device) + held) / max(1, each))

    def _has_memory(self, slots: int, length: int) -> bool:
        grown = sum(max(0, slots * length - cache.slots * cache.length) * place for cache, place in self._caches())
        return grown == 0 or grown <= CACHE_SHARE * free_memory(self.device)

    def _caches(self) -> list[tuple[KVCache, int]]:
        """All caches, each with its bytes for a place of a slot."""
        return [(self.cache, self.net.cache_bytes), *self._beside]

    def reserve(self, used: int, slots: int, length: int) -> None:
        """Make the cache at least that large; the first `used` slots keep what they hold."""
        slots, length = self._size(slots, length)
        if slots > self.cache.slots or length > self.cache.length:
            grown = max(slots, self.cache.slots), max(length, self.cache.length)
            with self._memory():
                self.cache.resize(*(grown if self._has_memory(*grown) else (slots, length)), used)

    def forget(self) -> None:
        """Give the cache's memory back. Captured steps keep theirs: to capture takes seconds."""
        if self.capture is None:
            self.reset()

    def reset(self) -> None:
        """After an error: numbers that are not finite may be in the cache."""
        for cache, _ in self._caches():
            cache.resize(0, 0)

    def run(self, batch: Batch) -> tuple[list[Iterator[int]], int]:
        """Take the step. For each part its next ids, which are drawn as they are asked for; and the number of steps.

        Raises:
            HardwareError: out of memory, or the network's output is not finite.
        """
        if self.capture is not None and not batch.prefill and not any(part.draft for part in batch.parts):
            with self._memory():
                ids = self.capture.replay(batch.sequences, self.cache, self.timer, batch.one_step)
            if ids is not None:
                return [_drawn(*pair) for pair in zip(batch.sequences, ids, strict=True)], len(ids[0])
        rows = self._rows(batch)
        return [_next_ids(part, row) for part, row in zip(batch.parts, rows, strict=True)], 1

    def _rows(self, batch: Batch) -> list[torch.Tensor]:
        """The logits [rows, V] of each part. Shared prompts are copied, and kept for sequences that start later."""
        computed = [part for part in batch.parts if part.source is None]
        logits: Iterator[torch.Tensor] = iter(())
        for part in batch.parts:
            if part.source == KEPT:
                self.cache.restore(part.shared.kept.cache, part.slot)
        if computed:
            tokens = [id for part in computed for id in _tokens(batch, part)]
            rows = self.forward(self.net, tokens, _step_input(batch, computed), self.cache, self.timer)
            logits = iter(rows.split([part.rows for part in computed]))
        found, last = [], {}
        for part in batch.parts:
            if part.source is None:
                found.append(next(logits))
                last[part.shared] = found[-1]
            elif part.source == KEPT:
                found.append(part.shared.kept.logits)
            else:
                self.cache.move(part.source, part.slot, part.end)
                found.append(last[part.shared])
        for shared, part in batch.to_keep().items():
            if part.end * self.net.cache_bytes <= CACHE_SHARE * free_memory(self.device):  # else it is read again
                shared.kept = KeptPrompt(self.cache.save(part.slot, part.end), last[shared].clone())
        return found

    def forward(
        self, net: GPTNeoX, tokens: list[int], step: StepInput, cache: KVCache, timer: StepTimer
    ) -> torch.Tensor:
        """One pass through `net`, which may be a draft network -> logits [N', V], see GPTNeoX.forward."""
        with self._memory():
            begun = time.perf_counter()
            logits = net(torch.tensor(tokens, device=self.device), step, cache)
            check_finite(bool(torch.isfinite(logits).all()), logits, self.device)  # waits for the device
            if step.spans is None:
                timer.add(len(tokens), time.perf_counter() - begun)
            return logits

    def _size(self, slots: int, length: int) -> tuple[int, int]:
        if self.capture is not None:
            slots = self.capture.slots(slots)
        step = self.capture.cache_step if self.capture else CACHE_STEP
        return slots, min(self.net.config.max_position_embeddings, -(-length // step) * step)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Around a step; says what took the memory if it runs out."""
        try:
            with torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            raise HardwareError(
                f"{self.device}: out of memory with {self.cache.slots} sequences of up to {self.cache.length} tokens; "
                "use a smaller batch_size or max_new_tokens, or a smaller dtype"
            ) from error


def _tokens(batch: Batch, part: Part) -> list[int]:
    """What goes through the network for a part."""
    ids = part.sequence.known if batch.prefill else part.sequence.ids
    return [*ids[part.begin : part.end], *part.draft]


def _step_input(batch: Batch, parts: list[Part]) -> StepInput:
    """Where the tokens of these parts belong."""
    if batch.prefill:
        return StepInput.chunks([(part.slot, part.begin, part.end, part.rows) for part in parts])
    if not any(part.draft for part in parts):
        return StepInput.decode([part.begin for part in parts])
    return StepInput.verify([(part.slot, part.begin, part.rows) for part in parts])


def _next_ids(part: Part, logits: torch.Tensor) -> Iterator[int]:
    """The next ids of a sequence, from the logits [rows, V] of its part. Not for one that ends before the prompt."""
    sequence = part.sequence
    if given := sequence.request.given:
        behind = part.end - len(sequence.request.ids)  # tokens after the prompt
        return _score(sequence, logits, given[behind + 1 - part.rows : behind + 1])
    return _draw(sequence, logits, part.draft)


def _draw(sequence: Sequence, logits: torch.Tensor, draft: list[int]) -> Iterator[int]:
    """Ids from logits [1 + draft tokens, V] until one is not the draft token."""
    for row, proposed in zip(logits, (*draft, None), strict=True):
        id = sequence.sampler.sample(row)
        yield id
        if id != proposed:
            return


def _score(sequence: Sequence, logits: torch.Tensor, given: tuple[int, ...]) -> Iterator[int]:
    """The ids that were given, of which logits [ids, V] say how likely they were."""
    for row, id in zip(logits, given, strict=True):
        sequence.sampler.take(row, id)
        yield id


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
