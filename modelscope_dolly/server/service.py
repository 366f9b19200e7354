"""What the endpoints of one server share: its settings, the model, its limits, and the way from prompts to answers."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from modelscope_dolly.engine.sequence import Request as EngineRequest
from modelscope_dolly.errors import DollyError, PromptError
from modelscope_dolly.generation import Prompt, TextGenerator
from modelscope_dolly.generation_settings import GenerationSettings
from modelscope_dolly.load import Dolly
from modelscope_dolly.server.api_errors import ApiError, of_engine, to_json
from modelscope_dolly.server.driver import Answers, Driver, Loader, generator_of
from modelscope_dolly.server.limits import Admission, Keys, RateLimit, read_json
from modelscope_dolly.server.metrics import Metrics
from modelscope_dolly.server.server_settings import ServerSettings

T = TypeVar("T")
#: Bytes of a body whose tokens take milliseconds; longer ones are prepared beside the event loop.
_SMALL = 1 << 15
_TOO_LONG = "context_length_exceeded"


@dataclass
class Record:
    """What is known of a request, for its line in the log and for the metrics. Never its text.

    Attributes:
        id: of the request; the client may choose it.
        outcome: "ok", or why it is not.
        answers: of the engine, as far as there are any.
        body_bytes: of the request.
    """

    id: str
    begun: float = field(default_factory=time.monotonic)
    outcome: str = "ok"
    key: str | None = None
    prompt_tokens: int = 0
    answers: Answers | None = None
    body_bytes: int = 0

    def ended(self, reason: str | ApiError) -> None:
        """The first reason counts: a connection that is dropped for one is then also disconnected."""
        if self.outcome == "ok":
            self.outcome = outcome_of(reason) if isinstance(reason, ApiError) else reason


def outcome_of(error: ApiError) -> str:
    """The outcome of a request that was answered with an error."""
    known = {401: "unauthorized", 404: "not_found", 408: "timeout", 413: "too_large", 429: "refused"}
    if error.code in ("timeout", "loading"):
        return error.code
    return known.get(error.status, "error" if error.status >= 500 else "invalid")


class Service:
    """One server.

    Args:
        settings: of the server.
        load: see driver.Loader.
        ready: called with the loaded model, or with what went wrong.
    """

    def __init__(
        self, settings: ServerSettings, load: Loader, ready: Callable[[Dolly | BaseException], None] = lambda _: None
    ):
        self.settings, self._ready = settings, ready
        self.keys, self.rate = Keys(settings.keys), RateLimit(settings.rate)
        self.metrics, self.driver = Metrics(), Driver(load, self._loaded)
        self.admission: Admission | None = None
        self.created = int(time.time())

    def _loaded(self, result: Dolly | BaseException) -> None:
        if isinstance(result, Dolly):
            engine = result.text_generator.engine
            self.admission = Admission(engine.slots or 1, self.settings.queue)
            for gauge, name in ((self.metrics.running, "running"), (self.metrics.waiting, "waiting")):
                gauge.set_function(functools.partial(getattr, self.admission, name))
            self.metrics.slots.set(self.admission.slots)
            self.metrics.queue_limit.set(self.settings.queue)
        self._ready(result)

    @property
    def generator(self) -> TextGenerator:
        """Raises ApiError: 503 while the model is being loaded."""
        return generator_of(self.driver)

    async def body(self, request: Request) -> dict[str, Any]:
        """Raises: see limits.read_json."""
        body, size = await read_json(request, self.settings.body_bytes, self.settings.arrival_seconds)
        record_of(request).body_bytes = size
        return body

    async def prepared(
        self, request: Request, function: Callable[[], T], slow: bool = False, code: str | None = None
    ) -> T:
        """The result of work over the body's text; in a thread where it would keep other requests waiting.

        Raises:
            ApiError: where it raises a DollyError; with the code for a PromptError.
        """
        try:
            if not slow and record_of(request).body_bytes <= _SMALL:
                return function()
            return await asyncio.get_running_loop().run_in_executor(None, function)
        except PromptError as error:
            raise of_engine(error, code) from None
        except DollyError as error:
            raise of_engine(error) from None

    async def ask(
        self, request: Request, prompts: Sequence[Prompt | list[int]], settings: GenerationSettings
    ) -> Answers:
        """Raises ApiError for a prompt that does not fit."""
        generator, admission = self.generator, self.admission
        assert admission is not None
        slow = settings.regex is not None or settings.json_schema is not None  # an automaton is built
        asked = await self.prepared(request, lambda: generator.requests(prompts, settings), slow, _TOO_LONG)
        record = record_of(request)
        record.prompt_tokens = prompt_tokens(asked.requests)
        record.answers = Answers(self.driver, asked, admission, self.metrics, self.settings.first_seconds)
        return record.answers


def prompt_tokens(asked: Sequence[EngineRequest]) -> int:
    """Of all prompts, each counted once: requests that share one hold the same list."""
    return sum(len(ids) for ids in {id(one.ids): one.ids for one in asked}.values())


def record_of(request: Request) -> Record:
    return request.scope["dolly.record"]


def new_id() -> str:
    return secrets.token_hex(12)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, "application/json")
