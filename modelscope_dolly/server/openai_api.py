"""The endpoints of the OpenAI API, and those for tokens that vLLM has beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from modelscope_dolly.answer_requests import Update
from modelscope_dolly.errors import shown
from modelscope_dolly.generation import TextGenerator, parse_input
from modelscope_dolly.server.api_errors import ApiError, wrong
from modelscope_dolly.server.driver import Answers
from modelscope_dolly.server.openai_requests import (
    CompletionRequest,
    checked_ids,
    parse_chat,
    parse_completion,
    prompt_ids,
)
from modelscope_dolly.server.openai_responses import ChatFormat, CompletionFormat, Header, Pieces, Usage, token_name
from modelscope_dolly.server.request_fields import Fields, model_named, required
from modelscope_dolly.server.service import Service, json_response, record_of
from modelscope_dolly.server.streaming import collect, event_stream


def routes(service: Service) -> list[Route]:
    return [
        Route("/v1/chat/completions", partial(chat, service), methods=["POST"]),
        Route("/v1/completions", partial(completions, service), methods=["POST"]),
        Route("/v1/models", partial(models, service), methods=["GET"]),
        Route("/v1/models/{name:path}", partial(model, service), methods=["GET"]),
        Route("/tokenize", partial(tokenize, service), methods=["POST"]),
        Route("/detokenize", partial(detokenize, service), methods=["POST"]),
    ]


async def chat(service: Service, request: Request) -> Response:
    generator = service.generator
    body = await service.body(request)
    asked = await service.prepared(request, lambda: parse_chat(body, service.settings.name))
    answers = await service.ask(request, [asked.prompt], asked.settings)
    header = Header(f"chatcmpl-{record_of(request).id}", "chat.completion", service.settings.name)
    format = ChatFormat(generator.tokenizer, asked.logprobs)
    if asked.stream:
        return await _stream(service, request, answers, header, format, asked.include_usage)
    return await _whole(request, answers, header, format)


async def completions(service: Service, request: Request) -> Response:
    generator = service.generator
    body = await service.body(request)
    asked = await service.prepared(request, lambda: parse_completion(body, service.settings.name, generator))
    header = Header(f"cmpl-{record_of(request).id}", "text_completion", service.settings.name)
    scores = await _scores(service, request, asked) if asked.echo and asked.logprobs is not None else None
    heads = [generator.tokenizer.decode(ids) if asked.echo else "" for ids in asked.prompts]
    count = asked.settings.num_return_sequences if asked.settings else 1
    format = CompletionFormat(generator.tokenizer, asked.logprobs is not None, heads, count, scores)
    if asked.settings is None:
        return _only_prompts(request, header, format, asked)
    answers = await service.ask(request, asked.prompts, asked.settings)
    if asked.stream:
        return await _stream(service, request, answers, header, format, asked.include_usage)
    return await _whole(request, answers, header, format)


async def _whole(request: Request, answers: Answers, header: Header, format: ChatFormat | CompletionFormat) -> Response:
    last = await collect(request.receive, answers.updates())
    usage = Usage(record_of(request).prompt_tokens, sum(update.new_tokens for update in last))
    return json_response(header.body([format.choice(update) for update in last], usage=usage.body()))


async def _stream(
    service: Service,
    request: Request,
    answers: Answers,
    header: Header,
    format: ChatFormat | CompletionFormat,
    include_usage: bool,
) -> Response:
    pieces, usage = Pieces(format), Usage(record_of(request).prompt_tokens)
    counts: dict[int, int] = {}
    more: dict[str, Any] = {"usage": None} if include_usage else {}

    def events(batch: list[Update] | None) -> Iterator[dict[str, Any]]:
        if batch is None:
            if include_usage:
                usage.completion_tokens = sum(counts.values())
                yield header.body([], chunk=True, usage=usage.body())
            return
        for update in batch:
            counts[update.index] = update.new_tokens
            for choice in pieces.choices(update):
                yield header.body([choice], chunk=True, **more)

    seconds, ended = service.settings.stall_seconds, record_of(request).ended
    return await event_stream(request.receive, answers.updates(), events, seconds, ended)


async def _scores(service: Service, request: Request, asked: CompletionRequest) -> list[list]:
    """For each prompt the log-probabilities of its tokens; None for the first, which nothing precedes."""
    generator, admission = service.generator, service.admission
    assert admission is not None
    room = generator.engine.window - (1 if asked.settings else 0)
    if too_long := [ids for ids in asked.prompts if not 0 < len(ids) <= room]:
        message = f"a prompt has {len(too_long[0])} tokens; with these settings 1 to {room} can be scored"
        raise wrong("prompt", message, "context_length_exceeded")
    admission.enter(len(asked.prompts))
    try:
        # it waits for the engine, as any caller of another thread does
        work = [partial(_score, generator, ids, asked.logprobs) for ids in asked.prompts]
        return [await asyncio.get_running_loop().run_in_executor(None, one) for one in work]
    finally:
        admission.leave(len(asked.prompts))


def _score(generator: TextGenerator, ids: list[int], top: int) -> list:
    return [(ids[0], None, ()), *(generator.score(ids, 1, top) if len(ids) > 1 else ())]


def _only_prompts(request: Request, header: Header, format: CompletionFormat, asked: CompletionRequest) -> Response:
    """The answer to max_tokens 0: nothing is generated."""
    tokens = [len(ids) for ids in asked.prompts]
    updates = [Update(index, "", "length", 0, count) for index, count in enumerate(tokens)]
    record_of(request).prompt_tokens = sum(tokens)
    return json_response(header.body([format.choice(update) for update in updates], usage=Usage(sum(tokens)).body()))


async def models(service: Service, request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(service)]})


async def model(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    if name != service.settings.name:
        message = f"there is no model {shown(name, 100)}; this is {service.settings.name!r}"
        raise ApiError(404, message, "model", "model_not_found")
    return json_response(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.name,
        "object": "model",
        "created": service.created,
        "owned_by": "modelscope-dolly",
        "max_model_len": service.generator.engine.window,
    }


async def tokenize(service: Service, request: Request) -> Response:
    """Token ids of a raw prompt, or of the prompt that a conversation becomes."""
    generator = service.generator
    body = await service.body(request)
    ids, names = await service.prepared(request, lambda: _tokenized(service, generator, body))
    more = {"token_strs": [token_name(generator.tokenizer, id) for id in ids]} if names else {}
    return json_response({"count": len(ids), "max_model_len": generator.engine.window, "tokens": ids, **more})


def _tokenized(service: Service, generator: TextGenerator, body: dict[str, Any]) -> tuple[list[int], bool]:
    fields = Fields(body)
    model_named(fields, service.settings.name)
    prompt, messages, context = fields.any("prompt"), fields.any("messages"), fields.any("context")
    names = fields.flag("return_token_strs")
    fields.ignore(("add_special_tokens", "add_generation_prompt"))
    fields.end()
    if (prompt is None) == (messages is None):
        raise wrong("prompt", "give either prompt, a text, or messages, a conversation", "missing_field")
    if messages is None:
        return prompt_ids("prompt", prompt, generator), names
    parsed = parse_input({"messages": messages}, context=context)
    return generator.tokenizer.encode(parsed.instruction, parsed.context), names


async def detokenize(service: Service, request: Request) -> Response:
    """The text of token ids, keys of control tokens included."""
    generator = service.generator
    fields = Fields(await service.body(request))
    model_named(fields, service.settings.name)
    tokens = required("tokens", fields.any("tokens"))
    fields.end()
    if not isinstance(tokens, list):
        raise wrong("tokens", f"tokens must be a list of token ids, found {type(tokens).__name__}")
    ids = checked_ids("tokens", tokens, generator)
    text = generator.tokenizer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return json_response({"prompt": text})
