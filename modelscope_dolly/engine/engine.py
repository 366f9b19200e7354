"""The engine of one loaded model: all callers submit requests to it and read tokens from it.

Each turn of its loop: the scheduler chooses what runs next (scheduler.py), the runner computes it and draws the tokens
(runner.py), each sequence takes its own and its caller finds them in a queue. Whichever caller waits for a token takes
the turn, for everybody; the others wait for it to end. So there is nothing to start, to stop, or to keep alive.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.runner import Runner, StepCapture
from modelscope_dolly.engine.scheduler import PREFILL_TOKENS, Scheduler, Speculation
from modelscope_dolly.engine.sequence import Group, Request, RunStats, Sequence, SharedPrompt, Token
from modelscope_dolly.engine.step_timer import StepTimer
from modelscope_dolly.errors import DollyError, HardwareError, PromptError, SettingError

#: Sequences that run at the same time, unless a caller says so.
SLOTS = 32
#: Tokens of a prompt that a CPU reads between two steps of the others: a few hundred milliseconds for 3b.
CHUNK_ON_CPU = 256


class Call(Group):
    """Requests that one caller has submitted together, and the tokens that are ready for it. Iterate it in any thread.

    Closing it cancels what goes on: its slots are free at the next step.
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
                item = self.ready.popleft()
                if isinstance(item, Exception):
                    raise item
                self._open -= item.finish_reason is not None
                yield item
        finally:
            self.close()

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
        slots: sequences that run at the same time, of all callers, as far as memory goes; a caller may ask for more.
    """

    net: GPTNeoX
    device: torch.device
    window: int
    speculation: Callable[[Runner], Speculation] | None = None
    capture: StepCapture | None = None
    timer: StepTimer = field(default_factory=StepTimer)
    slots: int = SLOTS
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
        """
        for request in requests:
            self._check(request)
        call = Call(self, requests, max(1, slots), stats)
        if self._state is None or self._state.process != os.getpid():
            with _creating:  # a fork copies the state of calls that nobody reads here, and perhaps a lock that is held
                if self._state is None or self._state.process != os.getpid():
                    self._state = _State(self)
        self._state.submitted.append(call)
        return call

    def _turn(self, call: Call) -> None:
        """Wait until somebody's turn has made a token for `call`, or take a turn."""
        state = self._state
        with state.changed:
            state.changed.wait_for(lambda: call.ready or not state.busy)
            if call.ready:
                return
            state.busy = True
        try:
            state.turn(self)
        finally:
            state.end_turn()

    def _cancel(self, call: Call, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Let go of a call; if somebody takes a turn now, the next one does it."""
        if finalizing():  # an argument, because names of modules are gone by then
            return
        state = self._state
        if state is None or state.process != os.getpid():
            return
        state.cancelled.append(call)
        with state.changed:
            if state.busy:
                return
            state.busy = True
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
        busy: whether somebody takes a turn.
        submitted: calls that the scheduler does not know yet.
        cancelled: calls that it is to forget.
    """

    def __init__(self, engine: Engine):
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.busy = False
        self.submitted: deque[Call] = deque()
        self.cancelled: deque[Call] = deque()
        self.runner = Runner(engine.net, engine.device, engine.timer, engine.capture)
        speculation = engine.speculation(self.runner) if engine.speculation else None
        chunk = CHUNK_ON_CPU if engine.device.type == "cpu" else PREFILL_TOKENS
        self.scheduler = Scheduler(engine.slots, chunk, self.runner.fits, speculation)

    def turn(self, engine: Engine) -> None:
        """One step for all callers."""
        self.runner.net, self.runner.timer, self.runner.capture = engine.net, engine.timer, engine.capture
        try:
            self.take()
            if not self.scheduler.idle:
                self._step()
        except Exception as error:  # of the device: nothing that runs can go on
            self._fail(error)
        except BaseException:  # Ctrl-C in the thread whose turn it is: the step is half done
            self._fail(HardwareError("another call of this process was interrupted in the middle of a step"))
            raise

    def end_turn(self) -> None:
        if self.scheduler.idle and not self.submitted:
            self.runner.forget()
        with self.changed:
            self.busy = False
            self.changed.notify_all()

    def take(self) -> None:
        """Read what callers have said since the last turn."""
        while self.submitted:
            call = self.submitted.popleft()
            self.scheduler.slots = max(self.scheduler.slots, min(call.limit, len(call.sequences)))
            for sequence in call.sequences:
                self.scheduler.add(sequence)
        while self.cancelled:
            self.cancelled.popleft().end()
        self._release()

    def _step(self) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            sequence = self.scheduler.waiting[0]
            raise HardwareError(
                f"{self.runner.device}: no memory for the keys and values of {sequence.request.length} tokens; "
                "use a smaller max_new_tokens, or a smaller dtype"
            )
        running = self.scheduler.running
        read = sum(sequence.decodes or sequence.prefilled > 0 for sequence in running)
        self.runner.reserve(read, len(running), max(sequence.request.length for sequence in running))
        sampled, steps = self.runner.run(batch)
        for sequence, item in self.scheduler.postprocess(batch, sampled, steps):
            if isinstance(item, Exception):
                sequence.group.end()
            sequence.group.ready.append(item)
        self._release()

    def _release(self) -> None:
        for source, target in self.scheduler.release():
            self.runner.cache.move(source, target)

    def _fail(self, error: Exception) -> None:
        """Every caller whose requests run gets the error; those that wait go on."""
        running = self.scheduler.running or list(self.scheduler.waiting)[:1]
        for call in {sequence.group for sequence in running}:
            call.end()
            call.ready.append(copy.copy(error))  # each caller's thread adds its own traceback
        list(self.scheduler.release())
        self.runner.reset()
