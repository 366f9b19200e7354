"""Answers of the engine -> bodies and stream events of the OpenAI API."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelscope_dolly.answer_requests import Update
from modelscope_dolly.prompt import DollyTokenizer


@dataclass
class Usage:
    """Tokens of a request. The prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int = 0

    def body(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Header:
    """What all parts of one response begin with.

    Attributes:
        id: of the response.
        kind: "chat.completion" or "text_completion".
        model: as the server names it.
    """

    id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict], chunk: bool = False, **more: Any) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if chunk and self.kind.startswith("chat") else self.kind
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


class ChatFormat:
    """Choices of /v1/chat/completions.

    Args:
        tokenizer: names tokens.
        logprobs: whether choices have them.
    """

    def __init__(self, tokenizer: DollyTokenizer, logprobs: bool):
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def choice(self, update: Update) -> dict[str, Any]:
        message = {"role": "assistant", "content": update.text, "refusal": None}
        return {
            "index": update.index,
            "message": message,
            "logprobs": self._content(update.logprobs),
            "finish_reason": update.finish_reason,
            **_chosen(update),
        }

    def begin(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, logprobs: Sequence | None, offset: int) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, self._content(logprobs))

    def end(self, index: int, finish_reason: str) -> dict[str, Any]:
        return self._chunk(index, {}, None, finish_reason)

    def _chunk(self, index: int, delta: dict, logprobs: Any = None, finish_reason: str | None = None) -> dict:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _content(self, logprobs: Sequence | None) -> dict[str, Any] | None:
        if not self._logprobs or logprobs is None:
            return None
        content = []
        for one in logprobs:
            top = [self._token(*pair) for pair in one.top]
            content.append({**self._token(one.id, one.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        bytes_ = list(self._tokenizer.token_bytes(id))
        return {"token": token_name(self._tokenizer, id), "logprob": logprob, "bytes": bytes_}


class CompletionFormat:
    """Choices of /v1/completions.

    Args:
        tokenizer: names tokens.
        logprobs: whether choices have them.
        heads: the text of each prompt, to be put before its answers; empty texts where it is not asked for.
        scores: log-probabilities of each prompt's tokens, where they are asked for: None for the first one.
        answers: to each prompt.
    """

    def __init__(
        self,
        tokenizer: DollyTokenizer,
        logprobs: bool,
        heads: Sequence[str],
        answers: int,
        scores: Sequence[Sequence] | None = None,
    ):
        self._tokenizer, self._logprobs, self._heads, self._answers = tokenizer, logprobs, heads, answers
        self._scores = scores

    def choice(self, update: Update) -> dict[str, Any]:
        prompt = update.index // self._answers
        before = self._scores[prompt] if self._scores else ()
        logprobs = self._table([*before, *(update.logprobs or ())]) if self._logprobs else None
        text = self._heads[prompt] + update.text
        return {**self._choice(update.index, text, logprobs, update.finish_reason), **_chosen(update)}

    def begin(self, index: int) -> dict[str, Any] | None:
        head = self._heads[index // self._answers]
        return self._choice(index, head, None, None) if head else None

    def piece(self, index: int, text: str, logprobs: Sequence | None, offset: int) -> dict[str, Any]:
        offset += len(self._heads[index // self._answers])
        table = self._table(logprobs, offset) if self._logprobs and logprobs is not None else None
        return self._choice(index, text, table, None)

    def end(self, index: int, finish_reason: str) -> dict[str, Any]:
        return self._choice(index, "", None, finish_reason)

    def _choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _table(self, logprobs: Sequence, offset: int = 0) -> dict[str, list]:
        """Column by column. The first token of a text has no probability; it stands as (id, None, ()).

        Args:
            logprobs: of tokens that stand one behind the other.
            offset: of the first one in its text.
        """
        table: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        written = b""
        for id, logprob, top in logprobs:
            name = token_name(self._tokenizer, id)
            likely = {token_name(self._tokenizer, other): value for other, value in top}
            table["tokens"].append(name)
            table["token_logprobs"].append(logprob)
            table["top_logprobs"].append(None if logprob is None else {name: logprob, **likely})
            table["text_offset"].append(offset + len(written.decode("utf-8", "replace")))
            written += self._tokenizer.token_bytes(id)
        return table


def _chosen(update: Update) -> dict[str, Any]:
    """What an answer was chosen from, a field of our own, where the request has `choices`."""
    return {} if update.choices is None else {"choices": [choice._asdict() for choice in update.choices]}


class Pieces:
    """The choices of stream events: what of each answer has not been sent yet."""

    def __init__(self, format: ChatFormat | CompletionFormat):
        self._format = format
        self._texts: dict[int, int] = {}
        self._logprobs: dict[int, int] = {}

    def choices(self, update: Update) -> Iterator[dict[str, Any]]:
        index, shown = update.index, self._texts.get(update.index)
        if shown is None and (begin := self._format.begin(index)):
            yield begin
        logprobs = update.logprobs
        new = logprobs[self._logprobs.get(index, 0) :] if logprobs is not None else None
        if len(update.text) > (shown or 0) or new:
            yield self._format.piece(index, update.text[shown or 0 :], new, shown or 0)
        self._texts[index] = len(update.text)
        self._logprobs[index] = len(logprobs or ())
        if update.finish_reason:
            yield self._format.end(index, update.finish_reason)


def token_name(tokenizer: DollyTokenizer, id: int) -> str:
    """A token as text, the key of a special one; as bytes where they are no whole characters, as OpenAI does."""
    data = tokenizer.token_bytes(id)
    if not data:
        return tokenizer.tokenizer.convert_ids_to_tokens(id) or f"token_id:{id}"
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
