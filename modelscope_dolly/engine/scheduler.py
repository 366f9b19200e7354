"""What runs next: which requests get a slot, and whether a step prefills their prompts or decodes all that run.

Plain Python over counts and lists. Answers of dolly end after 5 to 256 tokens, so a slot whose sequence has ended is
given the next request at once instead of waiting for its neighbours (continuous batching; Yu et al. 2022, "Orca").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from modelscope_dolly.engine.sequence import Request, RunStats, Sequence, Token

#: Prompts prefilled together hold at most this many tokens, which bounds the memory of a step.
PREFILL_TOKENS = 2048


class Speculation(Protocol):
    """Decides before each decode step which draft tokens it verifies; see speculative/decoding.py."""

    def may_propose(self, sequences: list[Sequence]) -> bool:
        """Whether a step of these sequences could ever have draft tokens."""

    def propose(self, sequences: list[Sequence]) -> list[list[int]]:
        """Draft tokens for each sequence, sequence i in slot i, as many as are worth verifying: often none."""

    def observe(self, sequence: Sequence, length: int, proposed: int, accepted: int) -> None:
        """The first `accepted` of `proposed` draft tokens were kept, behind the first `length` ids of the sequence."""

    def move(self, source: int, target: int) -> None:
        """A sequence has changed its slot."""


@dataclass(frozen=True)
class Batch:
    """One step.

    Attributes:
        prefill: whether whole prompts are read; otherwise each sequence continues from its newest token.
        first_slot: slot of the first sequence; the others follow.
        sequences: that take part.
        draft: for each sequence the draft tokens to verify; all empty for a prefill.
        one_step: draft tokens may come, so that no further step may follow before the host has seen this one.
    """

    prefill: bool
    first_slot: int
    sequences: list[Sequence]
    draft: list[list[int]]
    one_step: bool = False


class Scheduler:
    """Requests of a run, in order of arrival.

    Args:
        requests: to be answered.
        slots: sequences that run at the same time; sequence i of `running` holds slot i.
        stats: counts what is done.
        speculation: proposes draft tokens for decode steps.
    """

    def __init__(self, requests: list[Request], slots: int, stats: RunStats, speculation: Speculation | None = None):
        self.slots, self.stats, self.speculation = slots, stats, speculation
        self.waiting = deque(enumerate(requests))
        self.running: list[Sequence] = []

    @property
    def finished(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self) -> Batch:
        """Prefill for free slots comes first; otherwise all running sequences decode."""
        admitted = self._admit()
        if admitted:
            self.running.extend(admitted)
            self.stats.prefill_steps += 1
            self.stats.prefill_tokens += sum(len(sequence.request.ids) for sequence in admitted)
            return Batch(True, len(self.running) - len(admitted), admitted, [[] for _ in admitted])
        if self.speculation is None or not self.speculation.may_propose(self.running):
            return Batch(False, 0, list(self.running), [[] for _ in self.running])
        draft = self.speculation.propose(self.running)
        self.stats.proposed += sum(map(len, draft))
        return Batch(False, 0, list(self.running), draft, one_step=True)

    def postprocess(self, batch: Batch, sampled: list[Iterator[int]]) -> Iterator[Token]:
        """Give each sequence its new tokens, drawn as they are taken."""
        for sequence, draft, tokens in zip(batch.sequences, batch.draft, sampled, strict=True):
            length = len(sequence.ids)
            for token in sequence.append(tokens):
                self.stats.decode_tokens += not batch.prefill
                yield token
            if draft:
                accepted = _accepted(draft, sequence.ids[length:])
                self.stats.accepted += accepted
                self.speculation.observe(sequence, length, len(draft), accepted)

    def release(self) -> Iterator[tuple[int, int]]:
        """Free the slots of ended sequences. Yields (source, target) of each sequence that moves into a hole.

        The last running sequence moves, so that slots in use stay at the front.
        """
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finish_reason:
                last = self.running.pop()
                if slot < len(self.running):
                    self.running[slot] = last
                    if self.speculation is not None:
                        self.speculation.move(len(self.running), slot)
                    yield len(self.running), slot

    def _admit(self) -> list[Sequence]:
        """Take requests for free slots, as many as one prefill may hold."""
        admitted: list[Sequence] = []
        free, room = self.slots - len(self.running), PREFILL_TOKENS
        while self.waiting and len(admitted) < free and (not admitted or len(self.waiting[0][1].ids) <= room):
            sequence = Sequence(*self.waiting.popleft())
            admitted.append(sequence)
            room -= len(sequence.request.ids)
        return admitted


def _accepted(draft: list[int], new: list[int]) -> int:
    """How many draft tokens stand at the beginning of what was drawn."""
    count = 0
    while count < min(len(draft), len(new)) and draft[count] == new[count]:
        count += 1
    return count
