"""The decode loop. One answer, a list and a stream are the same loop: `Engine.run` yields tokens as they are made.

How it works
1. Requests wait in a queue; up to `slots` of them are active, each with its own row of the key/value cache.
2. Free slots are filled from the queue: the new prompts go through the network together, end to end, without padding
   (prefill), which gives each its first token.
3. All active slots take one step (decode), again and again. Answers of dolly end after 5 to 256 tokens, so a slot whose
   request has stopped is given the next one at once instead of waiting for its neighbours.
4. The state of a run belongs to that run. Concurrent runs share only the weights, which nothing writes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .errors import HardwareError, PromptError
from .neox import KVCache, NeoX, Step
from .sampling import Sampler, Sampling

#: Prompts prefilled together hold at most this many tokens, which bounds the memory of a pass.
PREFILL_TOKENS = 2048
#: Cache lengths are rounded up to this, so that runs of about the same length reuse the allocator's blocks.
_CACHE_STEP = 64


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, and how to answer it.

    Attributes:
        ids: the prompt.
        max_new_tokens: at least 1.
        sampling: how tokens are drawn.
        stop_ids: end the answer; such an id is its last one.
        watch: called with each new id but a stop id; True ends the answer.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    watch: Callable[[int], bool] | None = None


@dataclass(frozen=True)
class Token:
    """One made token: `index` of its request, its id, and whether it is the last one (`stop`, `length`, or None)."""

    index: int
    id: int
    finish_reason: str | None


@dataclass
class RunStats:
    """What a run did, for benchmarks and for the share of work that was useful."""

    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0


@dataclass
class _Active:
    """A request that holds a slot."""

    index: int
    request: Request
    sampler: Sampler
    cached: int  # tokens whose keys and values are in the cache
    last: int = 0  # the newest token, not yet in the cache
    made: int = 0

    def take(self, logits: torch.Tensor) -> Token:
        self.last = self.sampler.next(logits)
        self.made += 1
        reason = "length" if self.made >= self.request.max_new_tokens else None
        if self.last in self.request.stop_ids or (self.request.watch and self.request.watch(self.last)):
            reason = "stop"
        return Token(self.index, self.last, reason)


@dataclass
class Engine:
    """Makes text with a network.

    Attributes:
        net: the weights.
        device: where token ids go in.
        window: positions the network was trained for (2048).
    """

    net: NeoX
    device: torch.device
    window: int
    # One pass at a time: threads take turns instead of fighting for the same cores or the same stream, and
    # accelerate's hooks, which swap weights of an offloaded layer in and out, are not thread-safe.
    _pass: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def generate(self, requests: Sequence[Request], slots: int = 1) -> list[list[int]]:
        """The ids of each answer, in order, stop ids included."""
        answers: list[list[int]] = [[] for _ in requests]
        for token in self.run(requests, slots):
            answers[token.index].append(token.id)
        return answers

    def run(self, requests: Sequence[Request], slots: int = 1, stats: RunStats | None = None) -> Iterator[Token]:
        """Yield tokens as they are made, those of one request in order. Closing the generator ends the run.

        Raises:
            PromptError: a prompt is empty or does not fit the window with its new tokens.
        """
        requests = list(requests)
        for request in requests:
            self._check(request)
        if not requests:
            return
        stats = stats if stats is not None else RunStats()
        slots = max(1, min(slots, len(requests)))
        longest = max(len(request.ids) + request.max_new_tokens for request in requests)
        cache = KVCache(slots, min(self.window, -(-longest // _CACHE_STEP) * _CACHE_STEP))
        waiting = deque(enumerate(requests))
        active: list[_Active] = []  # active[i] holds slot i
        while waiting or active:
            fresh = self._admit(waiting, slots - len(active))
            if fresh:
                rows = self._prefill(fresh, len(active), cache)
                stats.prefill_tokens += sum(one.cached for one in fresh)
                stepped, begin = fresh, len(active)
                active.extend(fresh)
            else:
                rows = self._decode(active, cache)
                stats.decode_steps += 1
                stats.decode_tokens += len(active)
                stepped, begin = list(active), 0
            ended = []
            for place, (one, logits) in enumerate(zip(stepped, rows, strict=True), start=begin):
                token = one.take(logits)
                if token.finish_reason:
                    ended.append(place)
                yield token
            _release(active, ended, cache)

    def _check(self, request: Request) -> None:
        total = len(request.ids) + request.max_new_tokens
        if not request.ids or request.max_new_tokens < 1 or total > self.window:
            raise PromptError(
                f"a prompt of {len(request.ids)} tokens and {request.max_new_tokens} new ones do not fit the window of "
                f"{self.window}; both must be at least 1"
            )

    def _admit(self, waiting: deque, free: int) -> list[_Active]:
        """Take requests from the queue for free slots, as many as one prefill may hold."""
        fresh: list[_Active] = []
        room = PREFILL_TOKENS
        while waiting and len(fresh) < free and (not fresh or len(waiting[0][1].ids) <= room):
            index, request = waiting.popleft()
            fresh.append(_Active(index, request, Sampler(request.sampling, list(request.ids)), cached=len(request.ids)))
            room -= len(request.ids)
        return fresh

    def _prefill(self, fresh: list[_Active], first_slot: int, cache: KVCache) -> torch.Tensor:
        """Whole prompts, end to end, into the slots from `first_slot` on -> logits [len(fresh), V]."""
        ids: list[int] = []
        positions: list[int] = []
        spans = []
        for slot, one in enumerate(fresh, start=first_slot):
            spans.append((slot, len(ids), len(ids) + len(one.request.ids)))
            ids.extend(one.request.ids)
            positions.extend(range(len(one.request.ids)))
        return self._forward(ids, Step(torch.tensor(positions), spans=tuple(spans)), cache)

    def _decode(self, active: list[_Active], cache: KVCache) -> torch.Tensor:
        """The newest token of each active slot -> logits [len(active), V]."""
        positions = [one.cached for one in active]
        for one in active:
            one.cached += 1
        step = Step(torch.tensor(positions), length=max(positions) + 1)
        return self._forward([one.last for one in active], step, cache)

    def _forward(self, ids: list[int], step: Step, cache: KVCache) -> torch.Tensor:
        # inference_mode stays inside the pass: around a `yield` it would leak into the caller's code.
        with self._pass, torch.inference_mode():
            try:
                logits = self.net(torch.tensor(ids, device=self.device), step, cache)
            except torch.OutOfMemoryError as error:
                raise HardwareError(
                    f"{self.device}: out of memory with {cache.slots} answers of up to {cache.length} tokens in work; "
                    "use a smaller batch_size or max_new_tokens, or a smaller dtype"
                ) from error
            if not bool(torch.isfinite(logits).all()):
                number_type = str(logits.dtype).removeprefix("torch.")
                raise HardwareError(
                    f"the network's output is not finite in {number_type} on {self.device}: the weights are damaged "
                    "(dolly check) or overflow in this type; use dtype='bf16' or 'fp32'"
                )
            return logits


def _release(active: list[_Active], ended: list[int], cache: KVCache) -> None:
    """Free slots; the last active one moves into each hole, so that slots in use stay at the front."""
    for place in reversed(ended):
        last = len(active) - 1
        if place != last:
            cache.move(last, place)
            active[place] = active[last]
        active.pop()
