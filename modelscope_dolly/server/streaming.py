"""Answers on their way to a client: collected, or event by event; cancelled when nobody reads them any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelscope_dolly.answer_requests import Update
from modelscope_dolly.server.api_errors import ApiError, ClientGone, to_json
from modelscope_dolly.server.connection import ABORT

T = TypeVar("T")
#: Turns the news of the answers into the bodies of events; None stands for their end.
Events = Callable[[list[Update] | None], Iterator[dict[str, Any]]]


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection. Raises ClientGone then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(receive: Receive, updates: AsyncIterator[list[Update]]) -> list[Update]:
    """The last update of each answer, in the order of their indices."""
    last: dict[int, Update] = {}

    async def read() -> None:
        async for batch in updates:
            last.update({update.index: update for update in batch})

    try:
        await unless_gone(receive, read())
    finally:
        await updates.aclose()
    return [last[index] for index in sorted(last)]


async def event_stream(
    receive: Receive, updates: AsyncIterator[list[Update]], events: Events, stall_seconds: float, ended: Callable
) -> EventStream:
    """A response that begins with the first token, so that what goes wrong before it still has a status of its own."""
    try:
        first = await unless_gone(receive, anext(updates))
    except BaseException:
        await updates.aclose()
        raise
    return EventStream(first, updates, events, stall_seconds, ended)


class EventStream(Response):
    """Server-sent events, as the OpenAI API streams them.

    How far ahead of its reader a stream may be is bounded by the length of the answer: its tokens are kept, and the
    text that has come while the reader was busy is sent in one piece. The other answers never wait for it.

    Args:
        first: news that has been read already.
        updates: further news; closed at the end.
        events: makes bodies of them.
        stall_seconds: the connection is dropped when a piece has not been taken for so long.
        ended: called with "disconnected", "stalled", or the ApiError that ended the stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: list[Update],
        updates: AsyncIterator[list[Update]],
        events: Events,
        stall_seconds: float,
        ended: Callable[[str | ApiError], None],
    ):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._updates, self._events = first, updates, events
        self._stall_seconds, self._ended = stall_seconds, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(scope, send))
        except ClientGone:
            self._ended("disconnected")
        finally:
            await self._updates.aclose()

    async def _send(self, scope: Scope, send: Send) -> None:
        abort = scope.get("extensions", {}).get(ABORT)
        loop = asyncio.get_running_loop()

        def drop() -> None:
            self._ended("stalled")
            abort()

        async def write(body: bytes, more: bool = True) -> None:
            timer = loop.call_later(self._stall_seconds, drop) if abort else None
            try:
                await send({"type": "http.response.body", "body": body, "more_body": more})
            finally:
                if timer:
                    timer.cancel()

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await write(self._encoded(self._first))
            async for batch in self._updates:
                if data := self._encoded(batch):
                    await write(data)
            await write(self._encoded(None) + b"data: [DONE]\n\n", more=False)
        except ApiError as error:
            self._ended(error)
            await write(_event(error.body()), more=False)

    def _encoded(self, batch: list[Update] | None) -> bytes:
        return b"".join(_event(body) for body in self._events(batch))


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"
