"""Signals that arrive while a step of several callers is computed: handled when the step is whole.

Python runs the handlers of signals in the main thread, between any two of its instructions. Ctrl-C would leave a step
half done, and with it the sequences of callers who have not been interrupted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Those whose handlers commonly raise; SIGINT last, since its handler may run as soon as it is back in place.
_NUMBERS = tuple(getattr(signal, name) for name in ("SIGALRM", "SIGHUP", "SIGTERM", "SIGINT") if hasattr(signal, name))


class DeferredSignals:
    """A context in which the first signal waits until it is left; a second one is handled at once.

    Handlers of the system's own (which end the process, or ignore the signal) stay as they are. In other threads than
    the main one nothing happens, because no handler runs there.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: found for number in _NUMBERS if callable(found := signal.getsignal(number))}
            self._defer()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A part of the context in which signals are handled at once."""
        self._restore()
        try:
            yield
        finally:
            self._defer()

    def _defer(self) -> None:
        for number in self._handlers:
            signal.signal(number, self._take)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._pending is not None:
            number, frame = self._pending
            self._pending = None
            self._handlers[number](number, frame)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._pending is not None:
            self._handlers[number](number, frame)
        self._pending = number, frame
