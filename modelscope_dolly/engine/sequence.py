"""What a caller asks of the engine, and the state of a request while it is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from modelscope_dolly.engine.sampling import Sampler, Sampling


class Proposer(Protocol):
    """Proposes draft tokens for one sequence, for instance speculative.prompt_lookup.PromptLookup."""

    def append(self, token: int) -> None:
        """`token` is the next one of the sequence."""

    def propose(self, limit: int) -> tuple[list[int], list[float]]:
        """At most `limit` draft tokens, and for each the probability of being accepted if those before it are."""


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, and how to continue it.

    Attributes:
        ids: the prompt.
        max_new_tokens: at least 1.
        sampling: how tokens are drawn.
        stop_ids: end the sequence; such an id is its last one.
        on_token: called with each new id but a stop id; True ends the sequence.
        proposer: makes a proposer of draft tokens from the prompt; it changes the speed alone.
    """

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] | None = None
    proposer: Callable[[list[int]], Proposer] | None = None


@dataclass(frozen=True)
class Token:
    """A new token: `index` of its request, its id, and why it is the last one (`stop`, `length`), None if it is not."""

    index: int
    id: int
    finish_reason: str | None


@dataclass
class RunStats:
    """What a run did, for benchmarks.

    Attributes:
        prefill_steps, prefill_tokens: steps over prompts, and the tokens of the prompts.
        decode_steps, decode_tokens: steps after that, and the tokens they added.
        proposed, accepted: draft tokens that were verified, and those of them that were kept.
    """

    prefill_steps: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def steps(self) -> int:
        """Passes through the network."""
        return self.prefill_steps + self.decode_steps


class Sequence:
    """A request that holds a slot.

    Attributes:
        index: of the request.
        request: what was asked.
        ids: of the prompt and the new tokens so far; keys and values of the newest one are not in the cache yet.
        sampler: draws the next token.
        proposer: of draft tokens, or None.
        finish_reason: as in Token; None while it runs.
    """

    def __init__(self, index: int, request: Request):
        self.index, self.request = index, request
        self.finish_reason: str | None = None
        self.ids = list(request.ids)
        self.sampler = Sampler(request.sampling, request.ids)
        self.proposer = request.proposer(self.ids) if request.proposer else None

    @property
    def remaining(self) -> int:
        """Tokens that may still be added."""
        return self.request.max_new_tokens - (len(self.ids) - len(self.request.ids))

    def append(self, tokens: Iterator[int]) -> Iterator[Token]:
        """Add tokens until one is the last; no further one is drawn."""
        request = self.request
        for id in tokens:
            self.ids.append(id)
            self.finish_reason = "length" if self.remaining < 1 else None
            if id in request.stop_ids or (request.on_token and request.on_token(id)):
                self.finish_reason = "stop"
            elif self.proposer is not None:
                self.proposer.append(id)
            yield Token(self.index, id, self.finish_reason)
            if self.finish_reason:
                return
