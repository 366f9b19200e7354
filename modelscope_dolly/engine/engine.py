"""The engine of one loaded model: all callers submit requests to it and read tokens from it.

One thread takes the steps. Each turn of its loop: the scheduler chooses what runs next (scheduler.py), the runner
computes it and draws (runner.py), each sequence takes its tokens and its caller finds them in a queue. The thread
starts with the first request, sleeps while there is none, and ends with the engine or the process.
"""

from __future__ import annotations

import atexit
import copy
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.runner import Runner, StepCapture
from modelscope_dolly.engine.scheduler import PREFILL_TOKENS, Scheduler, Speculation
from modelscope_dolly.engine.sequence import Group, Request, RunStats, Sequence, Token
from modelscope_dolly.engine.step_timer import StepTimer
from modelscope_dolly.errors import DollyError, HardwareError, PromptError

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
        self.sequences = [Sequence(index, request, self) for index, request in enumerate(requests)]
        self._ready: SimpleQueue[Token | BaseException] = SimpleQueue()
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
                item = self._ready.get()
                if isinstance(item, BaseException):
                    self._open = 0
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

    def put(self, item: Token | BaseException) -> None:
        self._ready.put(item)


@dataclass(eq=False)
class _Mailbox:
    """What callers tell the engine's thread. It holds no reference to the engine, so that the engine can be freed."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    submitted: list[Call] = field(default_factory=list)
    cancelled: list[Call] = field(default_factory=list)
    closed: bool = False
    thread: threading.Thread | None = None

    def wait(self) -> bool:
        """Sleep until there is something to do; False where it is to end."""
        with self.changed:
            self.changed.wait_for(lambda: self.submitted or self.closed)
            return not self.closed

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


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
    _mailbox: _Mailbox = field(init=False, repr=False, default_factory=_Mailbox)
    _process: int = field(init=False, repr=False, default_factory=os.getpid)
    _loop: _Loop | None = field(init=False, repr=False, default=None)

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
        """Queue requests behind those of other callers.

        Args:
            requests: to be answered.
            slots: of these requests as many run at the same time; it changes the speed, not the tokens.
            stats: counts what is done for them.

        Raises:
            PromptError: a prompt is empty or does not fit the window with its new tokens.
        """
        for request in requests:
            self._check(request)
        call = Call(self, requests, max(1, slots), stats)
        if self._process != os.getpid():  # a fork copies no thread, and perhaps a lock that is held
            self._mailbox, self._process, self._loop = _Mailbox(), os.getpid(), None
        mailbox = self._mailbox
        with mailbox.changed:
            mailbox.submitted.append(call)
            if mailbox.thread is None:
                target, name = (weakref.ref(self), mailbox), "dolly-engine"
                mailbox.thread = threading.Thread(target=_serve, args=target, name=name, daemon=True)
                mailbox.thread.start()
                weakref.finalize(self, mailbox.close).atexit = False
                _stop_at_exit(mailbox)
            mailbox.changed.notify_all()
        return call

    def _cancel(self, call: Call) -> None:
        with self._mailbox.changed:
            self._mailbox.cancelled.append(call)

    def _check(self, request: Request) -> None:
        if not request.ids or request.max_new_tokens < 1 or request.length > self.window:
            raise PromptError(
                f"a prompt of {len(request.ids)} tokens and {request.max_new_tokens} new ones do not fit the window of "
                f"{self.window}; both must be at least 1"
            )


class _Loop:
    """The state of an engine's thread."""

    def __init__(self, engine: Engine):
        self.runner = Runner(engine.net, engine.device, engine.timer, engine.capture)
        speculation = engine.speculation(self.runner) if engine.speculation else None
        chunk = CHUNK_ON_CPU if engine.device.type == "cpu" else PREFILL_TOKENS
        self.scheduler = Scheduler(engine.slots, chunk, self.runner.fits, speculation)

    def work(self, engine: Engine, mailbox: _Mailbox) -> None:
        """Take steps until nothing is left to do."""
        while True:
            try:
                if not self._take(mailbox):
                    break
                self.runner.net, self.runner.timer, self.runner.capture = engine.net, engine.timer, engine.capture
                self._step()
            except Exception as error:  # of the device: nothing that runs can go on
                self._fail(error)
        self.runner.forget()

    def _take(self, mailbox: _Mailbox) -> bool:
        """Read the mailbox; False where there is nothing to do."""
        with mailbox.changed:
            submitted, cancelled = mailbox.submitted, mailbox.cancelled
            mailbox.submitted, mailbox.cancelled = [], []
            if mailbox.closed:
                return False
        for call in submitted:
            self.scheduler.slots = max(self.scheduler.slots, min(call.limit, len(call.sequences)))
            for sequence in call.sequences:
                self.scheduler.add(sequence)
        for call in cancelled:
            _end(call)
        self._release()
        return not self.scheduler.idle

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
                _end(sequence.group)
            sequence.group.put(item)
        self._release()

    def _release(self) -> None:
        for source, target in self.scheduler.release():
            self.runner.cache.move(source, target)

    def _fail(self, error: Exception) -> None:
        """Every caller whose requests run gets the error; those that wait go on."""
        running = self.scheduler.running or list(self.scheduler.waiting)[:1]
        for call in {sequence.group for sequence in running}:
            _end(call)
            call.put(copy.copy(error))  # each caller's thread adds its own traceback
        list(self.scheduler.release())
        self.runner.reset()


def _end(call: Call) -> None:
    for sequence in call.sequences:
        sequence.finish_reason = sequence.finish_reason or "cancelled"


def _serve(reference: weakref.ref[Engine], mailbox: _Mailbox) -> None:
    """The engine's thread. It keeps the engine alive only while there is work."""
    while mailbox.wait():
        engine = reference()
        if engine is None:
            return
        if engine._loop is None:
            engine._loop = _Loop(engine)
        engine._loop.work(engine, mailbox)
        del engine


_mailboxes: weakref.WeakSet[_Mailbox] = weakref.WeakSet()


def _stop_at_exit(mailbox: _Mailbox) -> None:
    """A thread inside torch when the interpreter goes away would crash it."""
    if not _mailboxes:
        atexit.register(_stop_all)
    _mailboxes.add(mailbox)


def _stop_all() -> None:
    for mailbox in list(_mailboxes):
        mailbox.close()
    for mailbox in list(_mailboxes):
        if mailbox.thread is not None:
            mailbox.thread.join(timeout=30)
