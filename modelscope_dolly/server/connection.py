"""One HTTP connection: uvicorn's, with time limits before a request is whole and with errors as JSON."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from modelscope_dolly.server.api_errors import ApiError, to_json

#: Name under which a request finds the function that drops its connection.
ABORT = "dolly.abort"


def connection_class(arrival_seconds: float) -> type[H11Protocol]:
    """A protocol for uvicorn.

    Args:
        arrival_seconds: that the headers of a request may take, the first ones from the moment of connecting.
    """

    class Connection(H11Protocol):
        _arrival: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            if self._arrival is None and (self.cycle is None or self.cycle.response_complete):
                self._expect()
            super().data_received(data)

        def handle_events(self) -> None:
            cycle = self.cycle
            super().handle_events()
            if self.cycle is not cycle:
                self._arrived()
                self.scope.setdefault("extensions", {})[ABORT] = self.transport.abort

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, msg.rstrip(".") + ": this is not HTTP/1.1"))

        def _expect(self) -> None:
            self._arrival = self.loop.call_later(arrival_seconds, self._too_slow)

        def _arrived(self) -> None:
            if self._arrival is not None:
                self._arrival.cancel()
                self._arrival = None

        def _too_slow(self) -> None:
            if not self.transport.is_closing():
                self._refuse(ApiError(408, f"no request arrived within {arrival_seconds:g} s"))

        def _refuse(self, error: ApiError) -> None:
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                body = to_json(error.body())
                status = HTTPStatus(error.status)
                head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
                self.transport.write(head.encode("ascii") + body)
            self.transport.close()

    return Connection
