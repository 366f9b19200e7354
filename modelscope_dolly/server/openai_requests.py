"""Bodies of the OpenAI API -> prompts and settings of ours, all checked; what dolly cannot do is refused by name.

Fields: https://platform.openai.com/docs/api-reference (chat, completions). Unknown fields are refused,
as OpenAI's own server does (vLLM ignores them): a misspelt limit that is silently dropped is found too late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelscope_dolly.errors import DollyError, is_whole, shown
from modelscope_dolly.generation import Prompt, TextGenerator, parse_input
from modelscope_dolly.generation_settings import MOST_LOGPROBS, SEEDS, GenerationSettings
from modelscope_dolly.prompt import check_text
from modelscope_dolly.server.api_errors import of_engine, wrong
from modelscope_dolly.server.request_fields import Fields, model_named, required

#: Answers to one prompt, as in the OpenAI API.
MOST_ANSWERS = 128
#: Stop strings of a request, and characters of each: they are searched for in every token's text.
MOST_STOPS, LONGEST_STOP = 16, 256
#: New tokens of a completion that does not say; of a chat, it is the pipeline's default.
COMPLETION_TOKENS = 16

#: Of OpenAI's fields: those that do not change an answer.
_IGNORED = (
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
)  # fmt: skip
_REFUSED = {
    "tools": "dolly cannot call tools",
    "functions": "dolly cannot call functions",
    "function_call": "dolly cannot call functions",
    "audio": "dolly reads and writes text",
    "prediction": "draft tokens come from the prompt by themselves",
    "web_search_options": "dolly does not search",
    "reasoning_effort": "dolly does not reason before it answers",
    "verbosity": "say in the instruction how long the answer should be",
    "moderation": "there is none here",
}
#: Settings that a body names as we do -> the value that asks for nothing.
_EXTRAS: dict[str, Any] = {
    "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "bad_words": (), "min_new_tokens": 0, "choices": (),
    "regex": None, "json_schema": None,
}  # fmt: skip


@dataclass(frozen=True)
class ChatRequest:
    """POST /v1/chat/completions.

    Attributes:
        prompt: the conversation, reduced.
        settings: of its answers.
        logprobs: whether the response has them.
        stream, include_usage: one event for each piece of text, with a last one that counts tokens.
    """

    prompt: Prompt
    settings: GenerationSettings
    logprobs: bool
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class CompletionRequest:
    """POST /v1/completions.

    Attributes:
        prompts: token ids of each.
        settings: of their answers; None where only the prompts are scored.
        echo: put each prompt before its answers.
        logprobs: how many of the likeliest tokens the response names in each place; None for no log-probabilities.
    """

    prompts: list[list[int]]
    settings: GenerationSettings | None
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool


def parse_chat(body: Mapping[str, Any], model: str) -> ChatRequest:
    """Raises ApiError: 400, or 404 for another model."""
    fields = Fields(body)
    model_named(fields, model)
    messages = _messages(required("messages", fields.any("messages")))
    context = fields.text("context")
    try:
        prompt = parse_input({"messages": messages}, context=context)
    except DollyError as error:
        raise wrong("messages", str(error)) from None
    limit = fields.any("max_tokens")
    limit = fields.any("max_completion_tokens", limit)
    keywords = {"max_new_tokens": _limit("max_tokens", limit, 1)} if limit is not None else {}
    logprobs, top = fields.flag("logprobs"), fields.whole("top_logprobs", None, 0, MOST_LOGPROBS)
    if top is not None and not logprobs:
        raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
    if logprobs:
        keywords["logprobs"] = top or 0
    _response_format(fields.object("response_format"), keywords)
    if fields.any("tool_choice", "none") not in ("none", "auto"):
        raise wrong("tool_choice", "tool_choice is not supported: dolly cannot call tools", "unsupported")
    if fields.any("modalities", ["text"]) != ["text"]:
        raise wrong("modalities", 'modalities must be ["text"]: dolly reads and writes text', "unsupported")
    stream, usage = _stream(fields)
    settings = _settings(fields, keywords)
    return ChatRequest(prompt, settings, logprobs, stream, usage)


def parse_completion(body: Mapping[str, Any], model: str, generator: TextGenerator) -> CompletionRequest:
    """Raises ApiError: 400, or 404 for another model."""
    fields = Fields(body)
    model_named(fields, model)
    prompts = _prompts(required("prompt", fields.any("prompt")), generator)
    fields.refuse({"suffix": "dolly writes what follows a text, not what stands inside it"})
    echo = fields.flag("echo")
    logprobs = fields.whole("logprobs", None, 0, MOST_LOGPROBS)
    limit = _limit("max_tokens", fields.any("max_tokens", COMPLETION_TOKENS), 0 if echo else 1)
    keywords: dict[str, Any] = {"max_new_tokens": max(1, limit)}
    if logprobs is not None:
        keywords["logprobs"] = logprobs
    best_of, count = fields.whole("best_of", None, 1, MOST_ANSWERS), body.get("n") or 1
    if best_of is not None and best_of != count:
        raise wrong("best_of", f"best_of is not supported beside another n: it must be {shown(count)}", "unsupported")
    stream, usage = _stream(fields)
    _response_format(fields.object("response_format"), keywords)
    settings = _settings(fields, keywords)
    if stream and echo and logprobs is not None:
        raise wrong("stream", "echo with logprobs is answered in one piece: leave out stream", "unsupported")
    return CompletionRequest(prompts, settings if limit else None, echo, logprobs, stream, usage)


def prompt_ids(name: str, text: object, generator: TextGenerator) -> list[int]:
    """Token ids of a raw prompt; a key typed in it stays text. Raises ApiError."""
    try:
        return generator.tokenizer.encode_text(check_text(name, text))
    except DollyError as error:
        raise wrong(name, str(error)) from None


def checked_ids(name: str, ids: Sequence[Any], generator: TextGenerator) -> list[int]:
    """Token ids that the network has. Raises ApiError."""
    most = generator.engine.net.config.vocab_size - 1
    for id in ids:
        if not is_whole(id, 0, most):
            raise wrong(name, f"{name} holds {shown(id, 60)}; token ids are whole numbers from 0 to {most}")
    return list(ids)


def _prompts(given: Any, generator: TextGenerator) -> list[list[int]]:
    """Of one text, several, token ids, or several lists of them."""
    if isinstance(given, str):
        return [prompt_ids("prompt", given, generator)]
    if isinstance(given, list) and given:
        if all(isinstance(each, str) for each in given):
            return [prompt_ids("prompt", each, generator) for each in given]
        if all(isinstance(each, list) for each in given):
            return [checked_ids("prompt", each, generator) for each in given]
        if not any(isinstance(each, (str, list)) for each in given):
            return [checked_ids("prompt", given, generator)]
    raise wrong("prompt", "prompt must be a text, a list of texts, token ids, or a list of lists of them")


def _messages(given: Any) -> Any:
    """Messages whose content is text; a list of parts becomes their text, a line each, as vLLM joins them."""
    if not isinstance(given, list):
        raise wrong("messages", f"messages must be a list of messages, found {type(given).__name__}")
    return [_message(number, message) for number, message in enumerate(given, start=1)]


def _message(number: int, message: Any) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            found = shown(kind, 60) if kind else "a part without a type"
            raise wrong("messages", f"content of message {number} has {found}; dolly reads text alone", "unsupported")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _limit(name: str, value: Any, low: int) -> int:
    if not is_whole(value, low, 2**31 - 1):
        raise wrong(name, f"{name} is {shown(value, 60)}, it must be a whole number of at least {low}")
    return int(value)


def _stream(fields: Fields) -> tuple[bool, bool]:
    stream, options = fields.flag("stream"), Fields(fields.object("stream_options"))
    usage = options.flag("include_usage")
    options.ignore(("include_obfuscation", "continuous_usage_stats"))
    options.end()
    return stream, usage


def _response_format(given: Mapping[str, Any], keywords: dict[str, Any]) -> None:
    kind = given.get("type", "text")
    if kind == "text":
        return
    if kind == "json_object":
        keywords["json_schema"] = {"type": "object"}
        return
    schema = given.get("json_schema")
    if kind == "json_schema" and isinstance(schema, Mapping) and isinstance(schema.get("schema"), (Mapping, bool)):
        keywords["json_schema"] = schema["schema"]
        return
    known = 'it must be {"type": "text"}, "json_object", or "json_schema" with {"json_schema": {"schema": ...}}'
    raise wrong("response_format", f"response_format is {shown(dict(given), 60)}; {known}", "unsupported")


def _settings(fields: Fields, keywords: dict[str, Any]) -> GenerationSettings:
    """What chats and completions have in common, on top of `keywords`; the end of the body."""
    count = fields.whole("n", 1, 1, MOST_ANSWERS)
    temperature = fields.real("temperature", None, 0, 1e6)
    if temperature is not None:
        keywords |= {"temperature": float(temperature)} if temperature > 0 else {"do_sample": False}
    if count > 1 and temperature == 0:
        raise wrong("n", f"n is {count}, but with temperature 0 all answers are the same: ask for one")
    keywords["num_return_sequences"] = count
    if (seed := fields.whole("seed", None, -(2**63), 2**63 - 1)) is not None:
        keywords["seed"] = seed % SEEDS
    if (top_k := fields.whole("top_k", None, -1, 2**31 - 1)) is not None:
        keywords["top_k"] = max(0, top_k)
    for name in ("top_p", "repetition_penalty", "on_overflow"):
        if (value := fields.any(name)) is not None:
            keywords[name] = value
    keywords["stop"] = _stop(fields.any("stop", ()))
    if bias := fields.object("logit_bias"):
        keywords["logit_bias"] = _bias(bias)
    for name, nothing in _EXTRAS.items():
        value = fields.any(name, nothing)
        if value != nothing and value != []:
            keywords[name] = value
    fields.ignore(_IGNORED)
    fields.refuse(_REFUSED)
    fields.end()
    try:
        return GenerationSettings().updated(keywords)
    except DollyError as error:
        named = [name for name in keywords if str(error).startswith(f"{name} ")]
        raise of_engine(error).about(named[0] if named else None) from None


def _stop(given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else None
    if texts is None or len(texts) > MOST_STOPS or not all(_is_stop(text) for text in texts):
        allowed = f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters"
        raise wrong("stop", f"stop is {shown(given, 60)}, it must be {allowed}")
    return texts


def _is_stop(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text) <= LONGEST_STOP


def _bias(given: Mapping[str, Any]) -> dict[int, float]:
    biases = {}
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and -100 <= value <= 100
        if not (name.isascii() and name.isdigit() and len(name) < 10 and number):
            raise wrong("logit_bias", "logit_bias must map token ids to numbers from -100 to 100", None)
        biases[int(name)] = float(value)
    return biases
