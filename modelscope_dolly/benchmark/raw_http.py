"""A client of HTTP/1.1 that may misbehave: a connection for each request, read as slowly or as little as one likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What has come: `status` and `headers` first, the `body` when it has been read."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    _reader: asyncio.StreamReader = field(repr=False, default=None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, chunk by chunk. Raises asyncio.IncompleteReadError where it ends too early."""
        if self.headers.get("transfer-encoding") != "chunked":
            yield await self._reader.readexactly(int(self.headers["content-length"]))
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]


class Connection:
    """A connection with one request; leaving the `async with` block drops it, finished or not."""

    def __init__(self, host: str, port: int, limit: int = 1 << 16):
        self._host, self._port, self._limit = host, port, limit

    async def __aenter__(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection(self._host, self._port, limit=self._limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def send(self, method: str, path: str, body: bytes = b"", key: str | None = None) -> None:
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        head += f"authorization: Bearer {key}\r\n" if key else ""
        self.writer.write(head.encode() + b"\r\n" + body)
        await self.writer.drain()

    async def reply(self, whole: bool = True) -> Reply:
        """Wait for the head of the reply, and for its body too unless told otherwise."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.split(":", 1) for line in lines[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        reply = Reply(int(lines[0].split()[1]), headers, _reader=self.reader)
        if whole:
            reply.body = b"".join([piece async for piece in reply.pieces()])
        return reply
