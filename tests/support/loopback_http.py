"""The HTTP server under the loopback hub: requests in, replies out, and faults where they are asked for."""

import socket
import socketserver
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    kind   "drop"    the connection closes before the request is processed
           "cut"     it closes in the middle of the request's body or, where there is none, of the answer's body
           "lost"    the request is carried out, and the connection closes instead of an answer
           "status"  the request is not carried out; the answer is `status` with `headers` and an error body
    """

    kind: str
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "injected fault"  # the client takes a 400 with "exist" or "already" in it for a duplicate

    def __post_init__(self) -> None:
        if self.kind not in ("drop", "cut", "lost", "status"):
            raise ValueError(f"unknown kind of fault {self.kind!r}; known: drop, cut, lost, status")


class Request(NamedTuple):
    """One request as it arrived; `path` includes the query, header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Refusal(Exception):
    """An error answer. `code` is the number that tells errors of one status apart on the /api/v1 surface."""

    def __init__(self, status: int, message: str, code: int = 0, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code or status, headers or {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second would wait 40 ms for an ack

    def _serve(self) -> None:
        hub = self.server.hub
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        length = int(request.headers.get("content-length", 0))
        chunked = "chunked" in request.headers.get("transfer-encoding", "")
        fault = hub.see(request)
        kind = fault.kind if fault else ""
        if kind == "drop":
            return self._hang_up()
        if kind == "cut" and (length or chunked):
            self.rfile.read(length // 2)  # of a chunked body nothing: its middle is not known yet
            return self._hang_up()
        body = self._read_chunked() if chunked else self._read(length)
        if kind == "status":
            refusal = Refusal(fault.status, fault.message, headers=fault.headers)
            reply = hub.refuse(refusal, openapi=self.path.startswith("/openapi/"))
        else:
            reply = hub.answer(request, body)
        if kind == "lost":
            return self._hang_up()
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body[: len(reply.body) // 2] if kind == "cut" else reply.body)
        if kind == "cut":
            self._hang_up()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_CONNECT = _serve

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionAbortedError("the client hung up")  # half a request is none
        return data

    def _read_chunked(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0] or self._read(1), 16):  # no line at all: _read raises
            chunks.append(self._read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers, up to the empty line
            pass
        return b"".join(chunks)

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the client was faster

    def log_message(self, *_: object) -> None:
        """Nothing: `LoopbackHub.requests` is the log."""


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for every handler, and no socket outlives the test
    request_queue_size = 64  # the client opens up to eight connections at once, beside its idle ones

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # http.server's own also asks DNS for the name of 127.0.0.1

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)  # wakes the handler of an idle keep-alive connection
            except OSError:
                continue  # the client or the handler was faster
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # a client may hang up; anything else is a bug here
            self.hub.errors.append(error)
