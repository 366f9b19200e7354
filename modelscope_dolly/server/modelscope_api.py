"""POST /call and GET /describe, in the shapes of ModelScope's own server (modelscope.server, 1.40), with one
difference: an input that is a dict arrives whole, where that server passes on its first value and loses the context."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from modelscope_dolly import TASK
from modelscope_dolly.generation import Prompt, parse_input
from modelscope_dolly.generation_settings import GenerationSettings
from modelscope_dolly.server.api_errors import wrong
from modelscope_dolly.server.request_fields import Fields, required
from modelscope_dolly.server.service import Service, json_response
from modelscope_dolly.server.streaming import collect
from modelscope_dolly.task_shapes import as_input, output, refuse_keywords

#: What a client can send as it is.
_SAMPLE = {
    "input": {
        "instruction": "Where was she born?",
        "context": "Ada Lovelace was born in London in 1815.",
    },
    "parameters": {"max_new_tokens": 64, "do_sample": False},
}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def routes(service: Service) -> list[Route]:
    return [
        Route("/call", partial(call, service), methods=["POST"]),
        Route("/describe", partial(describe, service), methods=["GET"]),
    ]


async def call(service: Service, request: Request) -> Response:
    """{"input": what the pipeline takes, "parameters": its keywords} -> what the pipeline returns."""
    service.generator  # noqa: B018  (503 while the model is being loaded)
    fields = Fields(await service.body(request))
    given, parameters = required("input", fields.any("input")), fields.object("parameters")
    fields.end()
    inputs, many, prompts, settings = await service.prepared(request, lambda: _parsed(given, dict(parameters)))
    answers = await service.ask(request, prompts, settings)
    last = await collect(request.receive, answers.updates())
    outputs, count = [], settings.num_return_sequences
    for place, value in enumerate(inputs):
        texts = [output(value, update.text) for update in last[place * count : (place + 1) * count]]
        outputs.append(texts[0] if count == 1 else texts)
    return json_response(outputs if many else outputs[0])


def _parsed(given: Any, parameters: dict[str, Any]) -> tuple[list[Any], bool, list[Prompt], GenerationSettings]:
    refuse_keywords(parameters)
    context = parameters.pop("context", None)
    settings = GenerationSettings().updated(parameters)
    value = as_input(given)
    many = isinstance(value, list)
    if many and not value:
        raise wrong("input", "input is an empty list")
    inputs = [as_input(each) for each in value] if many else [value]
    return inputs, many, [parse_input(each, context=context) for each in inputs], settings


async def describe(service: Service, request: Request) -> Response:
    properties = {
        "text": {"type": "string", "description": "The instruction."},
        "instruction": {"type": "string", "description": "The same, as records of databricks-dolly-15k name it."},
        "context": {"type": "string", "description": "Text that the instruction is about."},
        "messages": {"type": "array", "description": "A conversation, in the place of an instruction."},
    }
    schema = {
        "input": {"type": "object", "properties": properties},
        "parameters": {"type": "object", "properties": _parameters()},
        "output": {"type": "object", "properties": {"text": {"type": "string"}}},
    }
    return json_response({"schema": {"task_name": TASK, "schema": schema}, "sample": _SAMPLE})


def _parameters() -> dict[str, Mapping[str, Any]]:
    """Of GenerationSettings, with their defaults; the type is that of the default, where it has one."""
    described = {}
    for field in dataclasses.fields(GenerationSettings):
        kind = _TYPES.get(type(field.default))
        plain = isinstance(field.default, (bool, int, float, str))
        described[field.name] = {
            **({"type": kind} if kind else {}),
            **({"default": field.default} if plain else {}),
        }
    return described
