"""Speculative decoding: which draft tokens each decode step verifies, and what is learnt from it.

A decode step reads all weights, so that a step over a few tokens takes about as long as a step over one where memory is
the limit. Draft tokens come from the text so far (prompt_lookup.py) or from a smaller network (draft_model.py). The
engine draws every token from the network's own logits and keeps a draft token only if it is the token drawn (Leviathan
et al. 2023, arXiv:2211.17192, with coupled draws instead of a rejection step).
"""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from modelscope_dolly.engine.runner import Runner
from modelscope_dolly.engine.scheduler import PREFILL_TOKENS
from modelscope_dolly.engine.sequence import Sequence
from modelscope_dolly.engine.speculative.draft_model import DraftJob, DraftModel, DraftRun, DraftState
from modelscope_dolly.engine.speculative.policy import MAX_DRAFT_TOKENS, draft_lengths, expected_accepted


class Proposal(NamedTuple):
    """Draft tokens of a proposer, and their acceptance probabilities."""

    ids: list[int]
    probabilities: list[float]


class SpeculativeDecoding:
    """The engine's `speculation`.

    Args:
        runner: of the engine; its network verifies.
        draft: a smaller network that proposes where a sequence's own proposer promises less.
    """

    def __init__(self, runner: Runner, draft: DraftModel | None = None):
        self._timer, self._vocabulary = runner.timer, runner.net.config.vocab_size
        self._idle = 0  # steps since draft tokens were verified
        self._draft = DraftRun(draft, runner, PREFILL_TOKENS) if draft else None
        self._states: WeakKeyDictionary[Sequence, DraftState] = WeakKeyDictionary()
        self._from_draft: WeakSet[Sequence] = WeakSet()  # whose tokens of this step are from the draft network

    def may_propose(self, sequences: list[Sequence]) -> bool:
        return self._draft is not None or any(sequence.proposer is not None for sequence in sequences)

    def propose(self, sequences: list[Sequence]) -> list[list[int]]:
        proposals = [self._ask(sequence) for sequence in sequences]
        counts, speed = draft_lengths([proposal.probabilities for proposal in proposals], self._timer, self._idle)
        drafts = [proposal.ids[:count] for proposal, count in zip(proposals, counts, strict=True)]
        self._from_draft.clear()
        if self._draft is not None:
            drafts = self._with_draft_model(self._draft, sequences, proposals, drafts, speed)
        self._idle = 0 if any(drafts) else self._idle + 1
        return drafts

    def observe(self, sequence: Sequence, length: int, proposed: int, accepted: int) -> None:
        if sequence in self._from_draft:
            self._states[sequence].observe(length, proposed, accepted)

    def move(self, source: int, target: int) -> None:
        if self._draft is not None:
            self._draft.cache.move(source, target)

    def _ask(self, sequence: Sequence) -> Proposal:
        """What the sequence's proposer says, up to an id that the network does not have."""
        limit = min(MAX_DRAFT_TOKENS, sequence.remaining - 1)
        if sequence.proposer is None or limit < 1:
            return Proposal([], [])
        ids, probabilities = sequence.proposer.propose(limit)
        ids = list(takewhile(lambda token: 0 <= token < self._vocabulary, ids[:limit]))
        return Proposal(ids, probabilities[: len(ids)])

    def _with_draft_model(
        self, draft: DraftRun, sequences: list[Sequence], proposals: list[Proposal], drafts: list[list[int]],
        speed: float,
    ) -> list[list[int]]:  # fmt: skip
        """The draft network's tokens instead of `drafts`, which promise `speed`, where that promises more."""
        offers = [proposal.probabilities for proposal in proposals]
        states = [self._states.setdefault(sequence, DraftState()) for sequence in sequences]
        candidates = []
        for place, (sequence, state) in enumerate(zip(sequences, states, strict=True)):
            probabilities = state.offer(min(MAX_DRAFT_TOKENS, sequence.remaining - 1))
            if expected_accepted(probabilities) > expected_accepted(offers[place]):
                offers[place] = probabilities
                candidates.append(place)
        if not candidates:
            return drafts
        seconds = draft.seconds(len(candidates))
        counts, promised = draft_lengths(offers, self._timer, self._idle, candidates, seconds)
        if promised <= speed:
            counts = [0 if place in candidates else len(ids) for place, ids in enumerate(drafts)]
        jobs = []
        drafts = [proposal.ids[:count] for proposal, count in zip(proposals, counts, strict=True)]
        for place in candidates:
            if counts[place]:
                jobs.append(DraftJob(place, sequences[place], states[place], counts[place]))
                self._from_draft.add(sequences[place])
            else:
                states[place].decline()
        for job, ids in zip(jobs, draft.propose(jobs) if jobs else [], strict=True):
            drafts[job.slot] = ids
        return drafts
