"""The engine of one loaded model: all callers submit requests to it and read tokens from it.

Each turn of its loop: the scheduler chooses what runs next (scheduler.py), the runner computes it and draws the tokens
(runner.py), each sequence takes its own and its caller finds them in a queue. Whichever caller waits for a token takes
the turn, for everybody; the others wait for it to end. So there is nothing to start, to stop, or to keep alive. A
server, whose callers are coroutines and cannot wait, has one thread that takes all turns instead: `Engine.work`.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from modelscope_dolly.engine.deferred_signals import DeferredSignals
from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.runner import Runner, StepCapture
from modelscope_dolly.engine.scheduler import PREFILL_TOKENS, Scheduler, Speculation
from modelscope_dolly.engine.sequence import Group, Request, RunStats, Sequence, SharedPrompt, Token
from modelscope_dolly.engine.step_timer import StepTimer
from modelscope_dolly.errors import DollyError, HardwareError, PromptError, SettingError
from modelscope_dolly.hardware import release_threads

#: Sequences that run at the same time, unless a caller says so.
SLOTS = 32
#: Tokens of a prompt that a CPU reads between two steps of the others: a few hundred milliseconds for 3b.
CHUNK_ON_CPU = 256


class Call(Group):
    """Requests that one caller has submitted together, and the tokens that are ready for it. Iterate it in any thread.

    A reader that cannot wait takes what is ready, whenever Engine.work delivers the call. Closing it cancels what goes
    on: its slots are free at the next step.
    """

    def __init__(self, engine: Engine, requests: list[Request], limit: int, stats: RunStats | None):
        super().__init__(limit, stats)
        self._engine, self._process = engine, os.getpid()
        # By identity: a list of ids that several requests hold is one prompt, which is read once.
        count = Counter(id(request.ids) for request in requests)
        shared = {key: SharedPrompt() for key, requests_of_it in count.items() if requests_of_it > 1}
        self.sequences = [Sequence(n, request, self, shared.get(id(request.ids))) for n, request in enumerate(requests)]
        self.ready: deque[Token | Exception] = deque()
        self._open = len(requests)

    def __iter__(self) -> Iterator[Token]:
        """Yield tokens as they are drawn, those of one request in order.

        Raises:
            HardwareError: see Runner.run; or whatever an on_token raised.
        """
        try:
            while self._open:
                if self._process != os.getpid():
                    raise DollyError("this call was begun before the process was forked; ask again in the new process")
                while not self.ready:
                    self._engine._turn(self)
                yield self._next()
        finally:
            self.close()
            self._engine._release_threads()

    def take(self) -> Iterator[Token]:
        """Yield the tokens that are ready, without waiting. Raises: as iterating does."""
        while self._open and self.ready:
            yield self._next()

    @property
    def open(self) -> int:
        """Requests whose last token has not been read; 0 also after an error, or when it was closed."""
        return self._open

    def _next(self) -> Token:
        item = self.ready.popleft()
        if isinstance(item, Exception):
            self.close()
            raise item
        self._open -= item.finish_reason is not None
        return item

    def close(self) -> None:
        """Cancel what goes on."""
        if self._open:
            self._open = 0
            self._engine._cancel(self)

    def end(self) -> None:
        """For whoever takes a turn: between two steps, or a step would overwrite it."""
        for sequence in self.sequences:
            sequence.finish_reason = sequence.finish_reason or "cancelled"


@dataclass
class Engine:
    """Continues token ids with a network. Safe to use from several threads.

    Attributes:
        net: the weights.
        device: where token ids go in.
        window: positions the network was trained for (2048).
        speculation: proposes draft tokens, with the engine's runner; without it none are verified.
        capture: of decode steps, for a network that lies on one CUDA device.
        timer: of decode steps.
        slots: sequences that run at the same time, of all callers, as far as memory goes. None is SLOTS, or as many as
            a call asks for if that is more.
    """

    net: GPTNeoX
    device: torch.device
    window: int
    speculation: Callable[[Runner], Speculation] | None = None
    capture: StepCapture | None = None
    timer: StepTimer = field(default_factory=StepTimer)
    slots: int | None = None
    _state: _State | None = field(init=False, repr=False, default=None)

    def generate(self, requests: list[Request], slots: int = 1) -> list[list[int]]:
        """The new ids of each request, in order, stop ids included."""
        answers: list[list[int]] = [[] for _ in requests]
        for token in self.run(requests, slots):
            answers[token.index].append(token.id)
        return answers

    def run(self, requests: list[Request], slots: int = 1, stats: RunStats | None = None) -> Iterator[Token]:
        """Submit when first iterated, and yield tokens as they are drawn. Closing the generator cancels.

        Args, Raises: see submit.
        """
        if requests:
            yield from self.submit(requests, slots, stats)

    def submit(self, requests: list[Request], slots: int = SLOTS, stats: RunStats | None = None) -> Call:
        """Queue requests behind those of other callers. They run while anybody waits for a token.

        Args:
            requests: to be answered.
            slots: of these requests as many run at the same time; it changes the speed, not the tokens.
            stats: counts what is done for them.

        Raises:
            PromptError: a prompt is empty or does not fit the window with its new tokens.
            SettingError: a token that the network does not have, or no token is left to be drawn.
            HardwareError: there is no memory for one of them, even if nobody else asked.
        """
        for request in requests:
            self._check(request)
        state = self._own_state()
        state.check_memory(max((request.length for request in requests), default=0))
        call = Call(self, requests, max(1, slots), stats)
        state.submitted.append(call)
        state.wake()
        return call

    def work(self, deliver: Callable[[set[Call]], None]) -> None:
        """Take all turns in this thread, until `rest` is called: for callers who cannot wait, those of a server.

        Callers of other threads then only wait. Use the thread that has loaded the network: every thread that computes
        has a pool of OpenMP threads, and pools that share the cores slow each other down.

        Args:
            deliver: called after each turn, in this thread, with the calls that have something to `take`.

        Raises:
            DollyError: another thread works for this engine.
        """
        state = self._own_state()
        with state.changed:
            if state.worker is not None:
                raise DollyError("another thread takes the turns of this engine already")
            state.worker = threading.get_ident()
        try:
            while state.begin_work():
                try:
                    calls = state.turn(self)
                finally:
                    state.end_turn()
                if calls:
                    deliver(calls)
        finally:
            with state.changed:
                state.worker, state.resting = None, False
                state.changed.notify_all()

    def rest(self) -> None:
        """Let `work` return after its turn, or as soon as it begins. Open calls go on when somebody iterates them."""
        state = self._own_state()
        with state.changed:
            state.resting = True
            state.changed.notify_all()

    def capacity(self, length: int) -> int:
        """How many sequences of so many tokens there is memory for, if nothing else runs."""
        return self._own_state().runner.capacity(length)

    @property
    def occupancy(self) -> tuple[int, int]:
        """Sequences that run and that wait, as of the last turn."""
        scheduler = self._own_state().scheduler
        return len(scheduler.running), len(scheduler.waiting)

    def _own_state(self) -> _State:
        """This process's; a fork copies the state of calls that nobody reads here, and perhaps a lock that is held."""
        state = self._state
        if state is None or state.process != os.getpid():
            with _creating:
                if self._state is None or self._state.process != os.getpid():
                    self._state = _State(self)
                state = self._state
        return state

    def _turn(self, call: Call) -> None:
        """Wait until somebody's turn has made a token for `call`, or take a turn."""
        state, me = self._state, threading.get_ident()
        assert state is not None
        if not call.ready and (state.owner or state.worker):
            self._release_threads()
        try:
            with state.changed:
                state.changed.wait_for(lambda: call.ready or not (state.owner or state.worker))
                if call.ready:
                    return
                state.owner = me
            state.computing.add(me)
            state.turn(self, call)
        finally:
            if state.owner == me:
                state.end_turn()

    def _release_threads(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """The calling thread takes no turn for now: what it has to compute with is not to slow down who does."""
        if finalizing():  # as in _cancel
            return
        state, me = self._state, threading.get_ident()
        if state is not None and me in state.computing:
            state.computing.discard(me)
            if self.device.type == "cpu":
                release_threads()

    def _cancel(self, call: Call, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Let go of a call; if somebody takes a turn now, or takes all of them, the next one does it."""
        if finalizing():  # an argument, because names of modules are gone by then
            return
        state = self._state
        if state is None or state.process != os.getpid():
            return
        state.cancelled.append(call)
        with state.changed:
            if state.owner or state.worker:
                state.changed.notify_all()
                return
            state.owner = threading.get_ident()
        try:
            state.take()
        finally:
            state.end_turn()

    def _check(self, request: Request) -> None:
        assert not request.given or len(request.given) == request.max_new_tokens
        if not request.ids or request.max_new_tokens < 1 or request.length > self.window:
            raise PromptError(
                f"a prompt of {len(request.ids)} tokens and {request.max_new_tokens} new ones do not fit the window of "
                f"{self.window}; both must be at least 1"
            )
        vocabulary, sampling = self.net.config.vocab_size, request.sampling
        unknown = [id for id in sampling.logit_bias if not 0 <= id < vocabulary]
        if unknown:
            raise SettingError(f"logit_bias: there is no token {unknown[0]}; ids are 0 to {vocabulary - 1}")
        if len({word[-1] for word in sampling.bad_words} | request.stop_ids) >= vocabulary:
            raise SettingError(f"bad_words: they may rule out all {vocabulary} tokens; give fewer")


def _new_lock() -> None:
    global _creating
    _creating = threading.Lock()


_new_lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class _State:
    """What the turns of an engine work on, in one process.

    Attributes:
        changed: told when a turn has ended. A lock alone would not do: who has just released one often takes it again
            before those who wait have woken up.
        owner: the thread whose turn it is, or None.
        worker: the thread that takes all turns, see Engine.work, or None; and whether it is to stop.
        computing: threads that have taken a turn, and still have what they compute with.
        submitted: calls that the scheduler does not know yet.
        cancelled: calls that it is to forget.
    """

    def __init__(self, engine: Engine):
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.owner: int | None = None
        self.worker: int | None = None
        self.resting = False
        self.computing: set[int] = set()
        self.submitted: deque[Call] = deque()
        self.cancelled: deque[Call] = deque()
        self._news: set[Call] = set()
        self._fixed = engine.slots is not None
        self.runner = Runner(engine.net, engine.device, engine.timer, engine.capture)
        speculation = engine.speculation(self.runner) if engine.speculation else None
        chunk = CHUNK_ON_CPU if engine.device.type == "cpu" else PREFILL_TOKENS
        self.scheduler = Scheduler(engine.slots or SLOTS, chunk, self.runner.fits, speculation)

    def check_memory(self, length: int) -> None:
        """Raises HardwareError where a request of so many tokens could never run."""
        if not self.runner.fits(1, length) and self.runner.capacity(length) < 1:
            raise self._no_memory(length)

    def wake(self) -> None:
        """Tell the thread that takes all turns of something new."""
        if self.worker is not None:
            with self.changed:
                self.changed.notify_all()

    def begin_work(self) -> bool:
        """Wait for something to do, and begin a turn; False when there is to be no further one."""
        with self.changed:
            self.changed.wait_for(lambda: self.resting or (self.owner is None and self._has_work()))
            if not self.resting:
                self.owner = self.worker
            return not self.resting

    def _has_work(self) -> bool:
        return bool(self.submitted or self.cancelled or not self.scheduler.idle)

    def turn(self, engine: Engine, call: Call | None = None) -> set[Call]:
        """One step for all callers, in the thread of `call`; returns the calls that have something to read.

        A signal is handled when the step is done, or in the middle of it if that ends `call` alone.
        """
        self.runner.net, self.runner.timer, self.runner.capture = engine.net, engine.timer, engine.capture
        with DeferredSignals() as signals:
            self._news = set()
            try:
                self.take()
                if not self.scheduler.idle:
                    self._step(signals, call)
            except Exception as error:  # of the device: nothing that runs can go on
                self._fail(error)
            except BaseException:  # Ctrl-C, in the middle of the step
                self._fail(HardwareError("another call of this process was interrupted in the middle of a step"))
                raise
            return self._news

    def end_turn(self) -> None:
        if self.scheduler.idle and not self.submitted:
            self.runner.forget()
        with self.changed:
            self.owner = None
            self.changed.notify_all()

    def take(self) -> None:
        """Read what callers have said since the last turn."""
        while self.submitted:
            call = self.submitted.popleft()
            if not self._fixed:
                self.scheduler.slots = max(self.scheduler.slots, min(call.limit, len(call.sequences)))
            for sequence in call.sequences:
                self.scheduler.add(sequence)
        while self.cancelled:
            self.cancelled.popleft().end()
        self._release()

    def _step(self, signals: DeferredSignals, call: Call | None) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            raise self._no_memory(self.scheduler.waiting[0].request.length)
        running = self.scheduler.running
        read = sum(sequence.decodes or sequence.prefilled > 0 for sequence in running)
        alone = all(sequence.group is call for sequence in running)
        with signals.allowed() if alone else nullcontext():
            self.runner.reserve(read, len(running), max(sequence.request.length for sequence in running))
            sampled, steps = self.runner.run(batch)
        for sequence, item in self.scheduler.postprocess(batch, sampled, steps):
            if isinstance(item, Exception):
                sequence.group.end()
            self._tell(sequence.group, item)
        self._release()

    def _tell(self, call: Call, item: Token | Exception) -> None:
        call.ready.append(item)
        self._news.add(call)

    def _no_memory(self, length: int) -> HardwareError:
        return HardwareError(
            f"{self.runner.device}: no memory for the keys and values of {length} tokens; use a smaller "
            "max_new_tokens, or a smaller dtype"
        )

    def _release(self) -> None:
        for source, target in self.scheduler.release():
            self.runner.cache.move(source, target)

    def _fail(self, error: Exception) -> None:
        """Every caller whose requests run gets the error; those that wait go on."""
        running = self.scheduler.running or list(self.scheduler.waiting)[:1]
        for call in {sequence.group for sequence in running}:
            call.end()
            self._tell(call, copy.copy(error))  # each caller's thread adds its own traceback
        list(self.scheduler.release())
        self.runner.reset()
