"""The decode loop. One answer, a list and a stream are the same loop: `Engine.run` yields tokens as they are made.

How it works
1. Requests wait in a queue; up to `slots` of them are active, each with its own row of the key/value cache.
2. Free slots are filled from the queue: the new prompts go through the network together, end to end, without padding
   (prefill), which gives each its first token.
3. All active slots take one step (decode), again and again. Answers of dolly end after 5 to 256 tokens, so a slot whose
   request has stopped is given the next one at once instead of waiting for its neighbours.
4. A step may verify guesses: a slot's newest token and the tokens guessed to follow it go through the network together,
   the answer's own sampler draws from each row of logits as ever, and the step ends at the first token that is not the
   one guessed. Keys and values of wrong guesses are overwritten by the next step.
5. On one CUDA device, steps without guesses are recorded and several run before the host looks: see decode.py.
6. The state of a run belongs to that run. Concurrent runs share only the weights, which nothing writes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from modelscope_dolly.engine.cuda_graphs import CACHE_STEP, Decoder, Recordings, burst, not_finite
from modelscope_dolly.engine.gpt_neox import KVCache, NeoX, Step
from modelscope_dolly.engine.sampling import Sampler, Sampling
from modelscope_dolly.engine.speculative.decoding import Guessing
from modelscope_dolly.engine.speculative.draft_model import Draft, Drafted, DraftRun
from modelscope_dolly.engine.speculative.prompt_lookup import Guesser, PassCost
from modelscope_dolly.errors import HardwareError, PromptError

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
        guesser: makes a guesser from the prompt, for instance guess.PromptLookup; it changes the speed alone.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    watch: Callable[[int], bool] | None = None
    guesser: Callable[[Sequence[int]], Guesser] | None = None


@dataclass(frozen=True)
class Token:
    """One made token: `index` of its request, its id, and whether it is the last one (`stop`, `length`, or None)."""

    index: int
    id: int
    finish_reason: str | None


@dataclass
class RunStats:
    """What a run did, for benchmarks and for the share of work that was useful.

    Attributes:
        prefill_passes, prefill_tokens: passes over prompts, and their tokens.
        decode_steps, decode_tokens: passes after that, and the tokens of answers they made.
        guessed, accepted: guesses verified, and those that were right.
        draft_passes: passes of the draft network.
    """

    prefill_passes: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    guessed: int = 0
    accepted: int = 0
    draft_passes: int = 0

    @property
    def passes(self) -> int:
        """Passes through the network itself."""
        return self.prefill_passes + self.decode_steps


@dataclass
class _Active:
    """A request that holds a slot."""

    index: int
    request: Request
    sampler: Sampler
    ids: list[int]  # of the prompt and the answer so far; the newest one is not in the cache yet
    guesser: Guesser | None
    drafted: Drafted = field(default_factory=Drafted)

    @property
    def room(self) -> int:
        """Tokens that may still be made."""
        return self.request.max_new_tokens - (len(self.ids) - len(self.request.ids))

    def take(self, made: torch.Tensor | list[int], guesses: Sequence[int]) -> Iterator[Token]:
        """The next tokens, from logits [1 + guesses, V] until one is not as guessed, or drawn on the device already."""
        if isinstance(made, list):
            for id in made:
                self.sampler.drew(id)
                token = self._add(id)
                yield token
                if token.finish_reason:
                    return
            return
        for row, guess in zip(made, (*guesses, None), strict=True):
            token = self._add(self.sampler.next(row))
            yield token
            if token.finish_reason or token.id != guess:
                return

    def _add(self, token: int) -> Token:
        self.ids.append(token)
        reason = "length" if self.room < 1 else None
        if token in self.request.stop_ids or (self.request.watch and self.request.watch(token)):
            reason = "stop"
        elif self.guesser is not None:
            self.guesser.add(token)
        return Token(self.index, token, reason)


@dataclass
class Engine:
    """Makes text with a network.

    Attributes:
        net: the weights.
        device: where token ids go in.
        window: positions the network was trained for (2048).
        draft: a smaller network that guesses for this one, if there is one.
        cost: what passes take, as measured; decides how many guesses one verifies.
        decoder: recorded steps, for a network that lies on one CUDA device.
    """

    net: NeoX
    device: torch.device
    window: int
    draft: Draft | None = None
    cost: PassCost = field(default_factory=PassCost)
    decoder: Decoder | None = None
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
        slots = max(1, min(slots, len(requests)))
        longest = max(len(request.ids) + request.max_new_tokens for request in requests)
        step = CACHE_STEP if self.decoder else _CACHE_STEP
        with self._cache(slots, min(self.window, -(-longest // step) * step)) as (cache, recordings):
            yield from self._run(requests, slots, cache, recordings, stats if stats is not None else RunStats())

    @contextmanager
    def _cache(self, slots: int, length: int) -> Iterator[tuple[KVCache, Recordings | None]]:
        """Keys and values of a run, and the recorded steps that work on them."""
        if self.decoder is None:
            yield KVCache(slots, length), None
            return
        with self.decoder.recordings(slots, length) as recordings:
            yield recordings.cache, recordings

    def _run(
        self, requests: list[Request], slots: int, cache: KVCache, recordings: Recordings | None, stats: RunStats
    ) -> Iterator[Token]:
        guessing = Guessing(self.net, self.cost, stats)
        if self.draft is not None:
            guessing.draft = DraftRun(self.draft, self._forward, KVCache(slots, cache.length), PREFILL_TOKENS)
        waiting = deque(enumerate(requests))
        active: list[_Active] = []  # active[i] holds slot i
        while waiting or active:
            fresh = self._admit(waiting, slots - len(active))
            begin = len(active) if fresh else 0
            if fresh:
                guesses, made = [[] for _ in fresh], self._prefill(fresh, begin, cache).split(1)
                active.extend(fresh)
                stats.prefill_passes += 1
                stats.prefill_tokens += sum(len(one.request.ids) for one in fresh)
            else:
                guesses = guessing.guess(active)
                made, steps = self._decode(active, guesses, cache, recordings)
                stats.decode_steps += steps
            ended: list[int] = []
            for place, found in enumerate(made, start=begin):
                one, guessed = active[place], guesses[place - begin]
                before = len(one.ids)
                for token in one.take(found, guessed):
                    stats.decode_tokens += not fresh
                    if token.finish_reason:
                        ended.append(place)
                    yield token
                guessing.learn(place, one, before, guessed)
            _release(active, ended, cache, guessing)

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
            guesser = request.guesser(request.ids) if request.guesser else None
            fresh.append(_Active(index, request, Sampler(request.sampling, request.ids), list(request.ids), guesser))
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

    def _decode(
        self, active: list[_Active], guesses: list[list[int]], cache: KVCache, recordings: Recordings | None
    ) -> tuple[Sequence[torch.Tensor | list[int]], int]:
        """One or several steps -> for each answer logits [1 + guesses, V] or drawn ids; and the number of steps."""
        if any(guesses):
            ids: list[int] = []
            blocks = []
            for slot, (one, guessed) in enumerate(zip(active, guesses, strict=True)):
                blocks.append((slot, len(one.ids) - 1, 1 + len(guessed)))
                ids.extend((one.ids[-1], *guessed))
            rows = self._forward(ids, Step.extend(blocks), cache)
            return rows.split([1 + len(guessed) for guessed in guesses]), 1
        made = self._replay(active, recordings) if recordings is not None else None
        if made is not None:
            return made, len(made[0])
        positions = [len(one.ids) - 1 for one in active]
        step = Step(torch.tensor(positions), length=max(positions) + 1)
        return self._forward([one.ids[-1] for one in active], step, cache).split(1), 1

    def _replay(self, active: list[_Active], recordings: Recordings) -> list[list[int]] | None:
        """Recorded steps -> ids of each answer; one step where guesses may come, else as many as pay."""
        steps = 1
        if self.draft is None and all(one.guesser is None for one in active) and self.cost.knows(len(active)):
            steps = burst(self.cost(len(active)), [one.room for one in active])
        with self._pass, torch.inference_mode(), self._memory(recordings.cache):
            board = recordings.prepare(active)
            if board is None:
                return None
            begun = time.perf_counter()
            made = board.run(active, steps)
            self.cost.add(len(active), (time.perf_counter() - begun) / steps)
            return made

    def _forward(self, ids: list[int], step: Step, cache: KVCache, draft: Draft | None = None) -> torch.Tensor:
        net, cost = (draft.net, draft.cost) if draft else (self.net, self.cost)
        # inference_mode stays inside the pass: around a `yield` it would leak into the caller's code.
        with self._pass, torch.inference_mode():
            begun = time.perf_counter()
            with self._memory(cache):
                logits = net(torch.tensor(ids, device=self.device), step, cache)
            if not bool(torch.isfinite(logits).all()):
                raise HardwareError(not_finite(logits.dtype, self.device))
            if step.spans is None:  # the check above has waited for the device
                cost.add(len(ids), time.perf_counter() - begun)
            return logits

    @contextmanager
    def _memory(self, cache: KVCache) -> Iterator[None]:
        """Say what took the memory if it runs out."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise HardwareError(
                f"{self.device}: out of memory with {cache.slots} answers of up to {cache.length} tokens in work; "
                "use a smaller batch_size or max_new_tokens, or a smaller dtype"
            ) from error


def _release(active: list[_Active], ended: list[int], cache: KVCache, guessing: Guessing) -> None:
    """Free slots; the last active one moves into each hole, so that slots in use stay at the front."""
    for place in reversed(ended):
        last = len(active) - 1
        if place != last:
            cache.move(last, place)
            guessing.move(last, place)
            active[place] = active[last]
        active.pop()
