"""Log-probabilities that stand for the engine's, where it does not make them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from modelscope_dolly.generation import GenerationSettings, TextGenerator, TextRequests


class TokenLogprob(NamedTuple):
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def install(monkeypatch, server) -> int:
    """Make the server's generator give log-probabilities; returns how many of the likeliest tokens it names."""
    if "logprobs" in {field.name for field in dataclasses.fields(GenerationSettings)}:
        return 2
    fields = [*dataclasses.fields(GenerationSettings)]
    known = GenerationSettings.updated
    names = fields[0]
    stub = dataclasses.field(default=None)
    stub.name = "logprobs"
    monkeypatch.setattr(
        "modelscope_dolly.server.openai_requests.dataclasses.fields", lambda _: [*fields, stub] if names else fields
    )
    monkeypatch.setattr(
        GenerationSettings,
        "updated",
        lambda self, keywords: known(self, {k: v for k, v in keywords.items() if k != "logprobs"}),
    )
    update = TextRequests.update
    drawn: dict[tuple[int, int], list[TokenLogprob]] = {}

    def with_logprobs(self, token):
        stopped = token.id in self.requests[token.index].stop_ids
        some = drawn.setdefault((id(self), token.index), [])
        some += [] if stopped else [TokenLogprob(token.id, -0.5, ((token.id, -0.5), (5, -1.5)))]
        found = update(self, token)
        if found is not None:
            object.__setattr__(found, "logprobs", tuple(some))
        return found

    monkeypatch.setattr(TextRequests, "update", with_logprobs)
    monkeypatch.setattr(
        TextGenerator,
        "score",
        lambda self, ids, begin, top=0: [TokenLogprob(id, -1.0, ((id, -1.0),)) for id in ids[begin:]],
        raising=False,
    )
    return 2
