"""Between the event loop of a server and the engine: one thread loads the model and takes all turns of its engine.

Coroutines submit requests and read what is ready; after each step the event loop is woken up once, for all streams that
have news. Nothing waits for a single token in a thread, and nothing is polled.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable

from modelscope_dolly.answer_requests import ChoiceRequests, TextRequests, Update
from modelscope_dolly.engine.engine import Call
from modelscope_dolly.errors import DollyError, one_line
from modelscope_dolly.generation import TextGenerator
from modelscope_dolly.load import Dolly
from modelscope_dolly.server.api_errors import ApiError, of_engine, wrong
from modelscope_dolly.server.limits import Admission
from modelscope_dolly.server.metrics import Metrics

#: Loads the model; called with a function that takes the number of weights so far and in all.
Loader = Callable[[Callable[[int, int], None]], Dolly]


class Driver:
    """The thread of the model.

    Args:
        load: called in the thread.
        ready: called in the event loop with the loaded model, or with what went wrong.

    Attributes:
        progress: weights read so far and in all.
        dolly: the model once it is loaded.
        error: why it could not be, or why the thread has ended.
    """

    def __init__(self, load: Loader, ready: Callable[[Dolly | BaseException], None]):
        self._load, self._ready = load, ready
        self.progress = (0, 0)
        self.dolly: Dolly | None = None
        self.error: BaseException | None = None
        self._events: dict[Call, asyncio.Event] = {}
        self._thread = threading.Thread(target=self._run, name="dolly-driver", daemon=True)
        self._stopped = False

    def start(self) -> None:
        """In the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, seconds: float = 5.0) -> bool:
        """Whether the thread has ended: a model that is still being loaded goes on."""
        self._stopped = True
        if self.dolly is not None:
            self.dolly.text_generator.engine.rest()
        await self._loop.run_in_executor(None, self._thread.join, seconds if self.dolly else 0.0)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            dolly = self._load(self._progressed)
        except BaseException as error:
            self.error = error
            self._call_soon(self._ready, error)
            return
        self._call_soon(self._loaded, dolly)
        try:
            if not self._stopped:
                dolly.text_generator.engine.work(lambda calls: self._call_soon(self._wake, calls))
        except BaseException as error:
            self.error = error
            self._call_soon(self._wake, None)

    def _progressed(self, read: int, total: int) -> None:
        self.progress = (read, total)

    def _call_soon(self, function: Callable, value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, value)

    def _loaded(self, dolly: Dolly) -> None:
        self.dolly = dolly
        self._ready(dolly)

    def _wake(self, calls: set[Call] | None) -> None:
        for call in self._events if calls is None else calls:
            if event := self._events.get(call):
                event.set()

    @contextlib.asynccontextmanager
    async def open(self, asked: TextRequests | ChoiceRequests, slots: int) -> AsyncIterator[tuple[Call, asyncio.Event]]:
        """Submit requests; the event is set when the call has something to take. Leaving cancels what goes on."""
        assert self.dolly is not None
        try:
            call = self.dolly.text_generator.engine.submit(asked.requests, slots)
        except DollyError as error:  # no memory, or no room: refused before it costs anything
            raise wrong(None, str(error)) from None
        event = self._events[call] = asyncio.Event()
        try:
            yield call, event
        finally:
            del self._events[call]
            call.close()


class Answers:
    """The answers to one request: an asynchronous iterator of what has come since the last look.

    Args:
        driver: of the model.
        asked: of the engine.
        admission: where they count as open.
        metrics: to be kept.
        first_seconds: until the first token.

    Attributes:
        first_token: seconds until the first one; None before it.
        drawn: tokens of all answers, stop ids included.
    """

    def __init__(
        self,
        driver: Driver,
        asked: TextRequests | ChoiceRequests,
        admission: Admission,
        metrics: Metrics,
        first_seconds: float,
    ):
        self._driver, self._asked, self._admission, self._metrics = driver, asked, admission, metrics
        self._first_seconds = first_seconds
        self._begun = time.monotonic()
        self._latest: dict[int, float] = {}
        self._left = 0
        self.first_token: float | None = None
        self.drawn = 0

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield the newest update of each answer that has one. Close it to cancel.

        Raises:
            ApiError: 429 or 503 for one that cannot begin in time, 500 for an error of the device.
        """
        self._admission.enter(len(self._asked.requests))
        self._left = len(self._asked.requests)
        try:
            async with self._driver.open(self._asked, self._admission.slots) as (call, event):
                while call.open:
                    await self._wait(event)
                    if updates := self._take(call):
                        yield updates
        except ApiError:
            raise
        except DollyError as error:
            raise of_engine(error) from None
        except Exception as error:  # whatever torch raised in a step
            raise ApiError(500, f"the engine failed: {one_line(error)}", code="device_error") from None
        finally:
            self._admission.leave(self._left)

    async def _wait(self, event: asyncio.Event) -> None:
        if self._driver.error is not None:
            raise ApiError(500, "the engine has stopped; restart the server", code="engine_stopped")
        if self.first_token is not None:
            await event.wait()
        else:
            left = self._begun + self._first_seconds - time.monotonic()
            try:
                await asyncio.wait_for(event.wait(), max(0.0, left))
            except asyncio.TimeoutError:
                message = f"no slot was free within {self._first_seconds:g} s; try again later"
                raise ApiError(503, message, code="timeout", retry_after=10) from None
        event.clear()

    def _take(self, call: Call) -> list[Update]:
        newest: dict[int, Update] = {}
        now, before = time.monotonic(), self.drawn
        for token in call.take():
            self._timed(token.index, now)
            if update := self._asked.update(token):
                newest[update.index] = update
            if token.finish_reason:
                self._left -= 1
                self._admission.leave(1, now - self._begun)
        self._metrics.tokens(self.drawn - before)
        return list(newest.values())

    def _timed(self, index: int, now: float) -> None:
        self.drawn += 1
        if self.first_token is None:
            self.first_token = now - self._begun
            self._metrics.first_token.observe(self.first_token)
        elif index in self._latest:
            self._metrics.between_tokens.observe(now - self._latest[index])
        self._latest[index] = now


def generator_of(driver: Driver) -> TextGenerator:
    """Of the loaded model. Raises ApiError: 503 while it is being loaded."""
    if driver.dolly is None:
        read, total = driver.progress
        done = f" ({read / total:.0%} of the weights are read)" if total else ""
        raise ApiError(503, f"the model is being loaded{done}; try again soon", code="loading", retry_after=5)
    return driver.dolly.text_generator
