"""What a caller asks of the engine, and the state of a request while it is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from modelscope_dolly.engine.constraints import Constraint
from modelscope_dolly.engine.logprobs import TokenLogprob
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
        on_token: called with each new id but a stop id, in the thread of any caller; True ends the sequence.
        proposer: makes a proposer of draft tokens from the prompt; it changes the speed alone.
        given: ids behind the prompt. They are scored instead of drawing any: they come back as its tokens, with their
            log-probabilities. There are max_new_tokens of them.
        constraint: makes what keeps the answer to a form.
    """

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] | None = None
    proposer: Callable[[list[int]], Proposer] | None = None
    given: tuple[int, ...] = ()
    constraint: Callable[[], Constraint] | None = None

    @property
    def length(self) -> int:
        """Places in the key/value cache that it may need."""
        return len(self.ids) + self.max_new_tokens


@dataclass(frozen=True)
class Token:
    """A new token.

    Attributes:
        index: of its request.
        id: of the token.
        finish_reason: why it is the last one (`stop`, `length`); None if it is not.
        logprob: of the token under the network, where the request asks for it.
    """

    index: int
    id: int
    finish_reason: str | None
    logprob: TokenLogprob | None = None


@dataclass
class RunStats:
    """What was done for the requests of one caller, for benchmarks.

    Attributes:
        prefill_steps, prefill_tokens: steps over its prompts, and their tokens.
        decode_steps, decode_tokens: steps after that which it took part in, and the tokens they added for it.
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
        """Passes through the network that its sequences took part in."""
        return self.prefill_steps + self.decode_steps


class Group:
    """Requests that were submitted together.

    Attributes:
        limit: sequences of it that may run at the same time.
        stats: what was done for it.
        running: sequences of it that hold a slot.
    """

    def __init__(self, limit: int, stats: RunStats | None = None):
        self.limit, self.stats = limit, stats or RunStats()
        self.running = 0


class SharedPrompt:
    """A prompt that several requests of one call have in common, which is read once.

    Attributes:
        unread: sequences that have yet to read it.
        kept: what the runner keeps of it for those that get a slot later; None where it keeps nothing.
    """

    def __init__(self) -> None:
        self.unread = 0
        self.kept: Any = None


class Sequence:
    """A request on its way: waiting, then in a slot.

    Attributes:
        index: of the request in its group.
        request: what was asked.
        group: that it belongs to.
        ids: of the prompt and the new tokens so far; keys and values of the newest one are not in the cache yet.
        known: ids that are known from the start and go through the network: the prompt and what is to be scored.
        prefilled: of these so many are in the cache as keys and values.
        shared: the prompt, while it is not read and others have the same; None otherwise.
        sampler: draws the next token.
        proposer: of draft tokens, or None.
        finish_reason: as in Token, or "cancelled"; None while it goes on.
    """

    def __init__(self, index: int, request: Request, group: Group, shared: SharedPrompt | None = None):
        self.index, self.request, self.group, self.shared = index, request, group, shared
        if shared is not None:
            shared.unread += 1
        self.finish_reason: str | None = None
        self.prefilled = 0
        self.ids = list(request.ids)
        self.known = [*request.ids, *request.given[:-1]] if request.given else request.ids
        constraint = request.constraint() if request.constraint else None
        self.sampler = Sampler(request.sampling, request.ids, request.stop_ids, constraint)
        self.proposer = request.proposer(self.ids) if request.proposer else None

    @property
    def decodes(self) -> bool:
        """Whether its prompt is in the cache."""
        return self.prefilled == len(self.known)

    @property
    def remaining(self) -> int:
        """Tokens that may still be added."""
        return self.request.max_new_tokens - (len(self.ids) - len(self.request.ids))

    def leave_shared(self) -> None:
        """It has read its prompt, or will never do so."""
        if self.shared is not None:
            self.shared.unread -= 1
            if not self.shared.unread:
                self.shared.kept = None
            self.shared = None

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
            yield Token(self.index, id, self.finish_reason, self.sampler.logprob)
            if self.finish_reason:
                return
