"""The ASGI application: routes, and around them what every request goes through."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelscope_dolly.errors import printable
from modelscope_dolly.server import modelscope_api, openai_api
from modelscope_dolly.server.api_errors import ApiError, ClientGone
from modelscope_dolly.server.service import Record, Service, json_response, new_id

#: One line for each request.
access = logging.getLogger("modelscope_dolly.access")
log = logging.getLogger("modelscope_dolly.server")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: Answered without a key: it tells a load balancer whether requests can come, and nothing else.
_OPEN = {"/health"}


def create_app(service: Service) -> Starlette:
    """The application of one server. Its lifespan starts and stops the thread of the model."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.driver.start()
        yield
        await service.driver.stop()

    own = [
        Route("/health", partial(health, service), methods=["GET"]),
        Route("/metrics", partial(metrics, service), methods=["GET"]),
    ]
    routes = [*openai_api.routes(service), *modelscope_api.routes(service), *own]
    paths = [(route.path_regex, route.path.split("{")[0]) for route in routes]
    gate = Middleware(Gate, service=service, paths=paths)
    return Starlette(routes=routes, middleware=[gate], lifespan=lifespan, exception_handlers={HTTPException: _refused})


async def health(service: Service, request: Request) -> Response:
    """200 once the model answers; before that 503, with how much of it has been read."""
    if service.driver.error is not None:
        return json_response({"status": "failed"}, 503)
    if service.driver.dolly is None:
        read, total = service.driver.progress
        return json_response({"status": "loading", "weights_read": read, "weights": total}, 503, {"retry-after": "1"})
    return json_response({"status": "ok"})


async def metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _refused(request: Request, error: Exception) -> Response:
    """What the router says: 404 for a path, 405 for a method that it does not know."""
    assert isinstance(error, HTTPException)
    kind = "method" if error.status_code == 405 else "path"
    name = request.method if kind == "method" else request.url.path
    problem = ApiError(error.status_code, f"there is no {kind} {printable(name)[:100]!r} here", code=f"unknown_{kind}")
    request.scope["dolly.record"].ended(problem)
    return json_response(problem.body(), error.status_code, dict(error.headers or {}))


class Gate:
    """Gives each request an id, checks its key and rate, answers errors, writes its line and counts it."""

    def __init__(self, app: ASGIApp, service: Service, paths: list[tuple[re.Pattern, str]]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        record = scope["dolly.record"] = Record(given if _ID.fullmatch(given) else new_id())
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode("ascii"))]
            await send(message)

        async def answer(error: ApiError) -> None:
            record.ended(error)
            if not status:
                await json_response(error.body(), error.status, error.headers())(scope, receive, noted)

        try:
            self._check(request, record)
            await self._app(scope, receive, noted)
        except ApiError as error:
            await answer(error)
        except ClientGone:
            record.outcome = "disconnected"
        except asyncio.CancelledError:  # by the server, when --drain seconds are over
            await answer(ApiError(503, "the server is stopping", code="stopping", retry_after=10))
            record.outcome = "cut"
        except Exception:
            log.exception("id=%s: a mistake of this program", record.id)
            await answer(ApiError(500, "a mistake of the server; its log has more under this request's id"))
        finally:
            self._note(scope, record, status)

    def _check(self, request: Request, record: Record) -> None:
        path = request.scope["path"]
        if path in _OPEN:
            return
        record.key = self._service.keys.check(request.headers.get("authorization"))
        client = request.client.host if request.client else "-"
        self._service.rate.check(record.key or client)

    def _note(self, scope: Scope, record: Record, status: int) -> None:
        endpoint = next((name for pattern, name in self._paths if pattern.match(scope["path"])), "other")
        self._service.metrics.requests.labels(endpoint, record.outcome).inc()
        answers = record.answers
        new = answers.drawn if answers else 0
        if new:
            self._service.metrics.prompt_tokens.inc(record.prompt_tokens)
        line: dict[str, Any] = {
            "id": record.id,
            "client": (scope.get("client") or ("-",))[0],
            "key": (record.key or "-").replace(" ", ""),
            "request": f"{scope['method'][:16]} {endpoint}",
            "status": status,
            "outcome": record.outcome,
            "prompt": record.prompt_tokens,
            "new": new,
            "first": f"{answers.first_token:.3f}s" if answers and answers.first_token is not None else "-",
            "total": f"{time.monotonic() - record.begun:.3f}s",
        }
        access.info(printable(" ".join(f"{name}={value}" for name, value in line.items())))
