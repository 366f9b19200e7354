"""Who may ask, how often, how much, and how many at the same time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from modelscope_dolly.server.api_errors import ApiError, ClientGone, wrong

#: Callers whose rates are remembered.
_CALLERS = 10_000
#: An oversized body is read up to this many times the limit, so that its sender reads the refusal.
_DISCARDED = 16


class Keys:
    """API keys, of which only digests are held. None of them lets everybody in."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> str | None:
        """The name of the caller's key, "key 1" for the first; None where no key is needed.

        Every key is compared, and each comparison takes the same time, so that the time tells nothing.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = _digest(key.strip()), None
        for number, known in enumerate(self._digests, start=1):
            if hmac.compare_digest(digest, known):
                found = f"key {number}"
        if found is None or scheme.lower() != "bearer":
            given = "the API key is not valid" if authorization else "an API key is required"
            raise ApiError(401, f"{given}: send the header Authorization: Bearer KEY", code="invalid_api_key")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class RateLimit:
    """Requests per minute of each caller: a token bucket that holds as many as one minute allows.

    Args:
        per_minute: 0 is no limit.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._per_minute, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> requests left, as of when

    def check(self, caller: str) -> None:
        """Count a request. Raises ApiError: 429."""
        if not self._per_minute:
            return
        now, each = self._clock(), 60 / self._per_minute
        left, then = self._left.pop(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - then) / each)
        self._left[caller] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > _CALLERS:
            self._left.popitem(last=False)
        if left < 1:
            wait = math.ceil((1 - left) * each)
            message = f"more than {self._per_minute} requests a minute; try again in {wait} s"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)


class Admission:
    """Answers in work and waiting, of all requests; the queue is bounded.

    Attributes:
        slots: answers that are worked on at the same time.
        queue: further ones that may wait.
        open: answers that have been accepted and not ended.
    """

    def __init__(self, slots: int, queue: int):
        self.slots, self.queue, self.open = slots, queue, 0
        self._seconds = 1.0  # of an answer, a running mean

    def enter(self, answers: int) -> None:
        """Accept a request for so many answers.

        Raises:
            ApiError: 429 with a time after which to try again; 400 where so many would never be accepted.
        """
        most = self.slots + self.queue
        if answers > most:
            raise wrong(None, f"one request asks for {answers} answers; this server takes {most} at a time")
        if self.open + answers > most:
            wait = max(1, min(60, round(self._seconds * (1 + self.waiting / self.slots))))
            message = (
                f"the queue is full: {self.running} answers in work, {self.waiting} waiting; try again in {wait} s"
            )
            raise ApiError(429, message, code="queue_full", retry_after=wait)
        self.open += answers

    def leave(self, answers: int, seconds: float | None = None) -> None:
        """So many answers have ended; `seconds` is what one took that was not cut short."""
        self.open -= answers
        if seconds is not None:
            self._seconds += 0.1 * (seconds - self._seconds)

    @property
    def running(self) -> int:
        return min(self.open, self.slots)

    @property
    def waiting(self) -> int:
        return max(0, self.open - self.slots)


async def read_json(request: Request, most: int, seconds: float) -> tuple[dict[str, Any], int]:
    """The body of a request, a JSON object, and its bytes.

    Args:
        request: whose body has not been read.
        most: bytes.
        seconds: for the body to arrive.

    Raises:
        ApiError: 408, 413, or 400 where it is no JSON object.
        ClientGone: the connection was closed before the end.
    """
    try:
        size, chunks = await asyncio.wait_for(_read(request, most), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", close=True) from None
    except ClientDisconnect:
        raise ClientGone from None
    if size > most:
        raise ApiError(413, f"the body has more than {most} bytes", code="body_too_large", close=True)
    try:
        value = json.loads(b"".join(chunks).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise wrong(None, f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise wrong(None, "the body is nested too deeply") from None
    except ValueError as error:
        where = f": {error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise wrong(None, f"the body is not JSON{where}") from None
    if not isinstance(value, dict):
        raise wrong(None, f"the body must be a JSON object, found {type(value).__name__}")
    return value, size


async def _read(request: Request, most: int) -> tuple[int, list[bytes]]:
    """How many bytes came, and the first `most` of them."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
        elif size > _DISCARDED * most:
            break
    return size, chunks
