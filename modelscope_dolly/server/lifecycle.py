"""From the start of `dolly serve` to its end: listen, load, answer, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from modelscope_dolly.errors import DollyError, printable
from modelscope_dolly.load import Dolly
from modelscope_dolly.server import startup
from modelscope_dolly.server.connection import connection_class
from modelscope_dolly.server.driver import Loader
from modelscope_dolly.server.http_app import access, create_app
from modelscope_dolly.server.server_settings import ServerSettings
from modelscope_dolly.server.service import Service

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(settings: ServerSettings, load: Loader, slots: int | None, model: str) -> int:
    """Serve until a signal comes; returns 0.

    Args:
        settings: of the server.
        load: the model; its engine's slots are chosen here.
        slots: that the user asks for; None for as many as there is memory for, at most 32.
        model: as the user names it, to be printed.

    Raises:
        DollyError: the port is in use, or the model cannot be loaded.
    """
    listener = startup.bind(settings)
    _log_to_stderr()
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    failed: list[BaseException] = []

    def loaded(progress: Callable[[int, int], None]) -> Dolly:
        dolly = load(progress)
        dolly.text_generator.engine.slots = startup.choose_slots(dolly, slots)
        return dolly

    def ready(result: Dolly | BaseException) -> None:
        if isinstance(result, BaseException):
            failed.append(result)
            server.should_exit = True
            return
        for line in startup.summary(settings, result, model):
            say(line)
        say(f"ready on {address}")

    service = Service(settings, loaded, ready)
    server = _Server(server_config(settings, service))
    with listener, server.capture_signals():  # before anybody is told that there is something to stop
        for warning in startup.warnings(settings):
            say(f"warning: {warning}")
        say(f"listening on {address}; loading {model}")
        asyncio.run(server.serve([listener]))
    if failed and isinstance(failed[0], DollyError):
        raise failed[0]
    if failed:
        raise DollyError(f"the model could not be loaded: {type(failed[0]).__name__}: {failed[0]}")
    say("stopped")
    if service.driver.dolly is None:  # the thread still loads; nothing depends on what it would do
        _leave(0)
    return 0


def server_config(settings: ServerSettings, service: Service) -> uvicorn.Config:
    """For uvicorn: one process, no log and no limit of its own beside those of the service."""
    return uvicorn.Config(
        create_app(service),
        http=connection_class(settings.arrival_seconds),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=settings.drain_seconds,
    )


class _Server(uvicorn.Server):
    """uvicorn's, but a signal that has been obeyed does not end the process as if it had not been."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            _leave(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds, tasks = self.config.timeout_graceful_shutdown, len(self.server_state.tasks)
        if tasks:
            say(f"stopping: {tasks} requests in work have {seconds:g} s; a second signal ends at once")
        await super().shutdown(sockets)


def say(line: str) -> None:
    """One line for the operator. A log that is closed or full is no reason to stop answering."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(line), file=sys.stderr, flush=True)


def _leave(code: int) -> Any:
    """End at once, whatever other threads do."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(code)


def _log_to_stderr() -> None:
    if not access.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
