"""A server in a thread of this process, for tests that speak HTTP to it; what it logs is kept."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from modelscope_dolly.load import Dolly
from modelscope_dolly.server import startup
from modelscope_dolly.server.lifecycle import server_config
from modelscope_dolly.server.server_settings import ServerSettings
from modelscope_dolly.server.service import Service


@dataclass
class Running:
    """A server that answers.

    Attributes:
        url: of it, without a slash at the end.
        service: behind its endpoints.
        lines: of all logs of this process while it runs.
    """

    url: str
    service: Service
    lines: list[str] = field(default_factory=list)
    logged: threading.Condition = field(default_factory=threading.Condition)

    def line(self, *parts: str) -> str:
        """Wait for a line of the log that has all parts."""
        with self.logged:
            found: list[str] = []

            def there() -> bool:
                found[:] = [line for line in self.lines if all(part in line for part in parts)]
                return bool(found)

            assert self.logged.wait_for(there, timeout=60), self.lines
            return found[0]

    def connect(self, data: bytes = b"") -> socket.socket:
        """A connection on which `data` has been sent."""
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(data)
        return connection

    def send(self, data: bytes) -> tuple[int, bytes]:
        """Status and rest of what comes back for raw bytes, until the server closes the connection."""
        with self.connect(data) as connection:
            answer = read_all(connection)
        return (int(answer.split(b" ", 2)[1]) if answer else 0), answer.partition(b"\r\n\r\n")[2]

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def engine(self):
        return self.service.generator.engine

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, dict]:
        """Status, body and headers of the response; a body that is bytes is sent as it is."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                text, status, sent = response.read(), response.status, dict(response.headers)
        except urllib.error.HTTPError as error:
            text, status, sent = error.read(), error.code, dict(error.headers)
        kind = sent.get("Content-Type", sent.get("content-type", ""))
        return status, json.loads(text) if "json" in kind else text.decode(), sent

    def chat(self, content: str = "Name a colour.", headers: dict[str, str] | None = None, **fields: Any):
        return self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields}, headers)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            found += data
    return found


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    """A request as it goes over the wire; `length` is what it claims."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


class _Lines(logging.Handler):
    def __init__(self, server: Running):
        super().__init__()
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        with self._server.logged:
            self._server.lines.append(self.format(record))
            self._server.logged.notify_all()


@contextlib.contextmanager
def running(dolly: Dolly, slots: int = 4, **settings: Any) -> Iterator[Running]:
    """A server of a loaded model on a free port."""
    chosen = ServerSettings(port=0, **settings)
    ready = threading.Event()

    def load(progress) -> Dolly:
        generator = copy.copy(dolly.text_generator)  # an engine of its own: another server may have the first
        generator.engine = dataclasses.replace(generator.engine, slots=slots)
        return dataclasses.replace(dolly, text_generator=generator)

    service = Service(chosen, load, lambda _: ready.set())
    server = uvicorn.Server(server_config(chosen, service))
    listener = startup.bind(chosen)
    one = Running("http://{}:{}".format(*listener.getsockname()[:2]), service)
    handler, loggers = _Lines(one), [logging.getLogger(), logging.getLogger("modelscope_dolly.access")]
    for logger in loggers:
        logger.addHandler(handler)
    level = loggers[1].level
    loggers[1].setLevel(logging.INFO)
    loggers[1].propagate = False
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert ready.wait(60)
        yield one
    finally:
        server.should_exit = True
        thread.join(60)
        for logger in loggers:
            logger.removeHandler(handler)
        loggers[1].setLevel(level)
        assert not thread.is_alive() and not any("Traceback" in line for line in one.lines), one.lines
