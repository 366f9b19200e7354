"""What runs next: which requests get a slot, and whether a step prefills prompts or decodes all that run.

Plain Python over counts and lists. Requests of all callers wait in order of arrival. Answers of dolly end after 5 to
256 tokens, so a slot whose sequence has ended is given the next request at once (continuous batching; Yu et al. 2022,
"Orca"). While others decode, prompts are read in chunks between their steps (chunked prefill; Agrawal et al. 2023,
arXiv:2308.16369). Chunks begin at multiples of a fixed length, so that a sequence is computed alike under any load.
Sequences of one call with the same prompt read it once: its keys and values are copied to the slots of the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from modelscope_dolly.engine.sequence import Sequence, SharedPrompt, Token

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


#: A `Part.source` that is no slot: what the runner has kept of a shared prompt.
KEPT = -1


class Part(NamedTuple):
    """What a step does for one sequence: `begin` to `end` of what it knows, or its newest token and draft tokens.

    `source` is the slot of a sequence whose prompt is read in this step, or KEPT: instead of reading the same prompt,
    its keys and values are copied from there, and its last logits are taken. None: the part is computed.
    """

    sequence: Sequence
    slot: int
    begin: int
    end: int
    draft: list[int]
    source: int | None = None

    @property
    def rows(self) -> int:
        """Of the last so many tokens, draft tokens included, logits are needed."""
        return 1 if self.begin < len(self.sequence.request.ids) else self.end - self.begin + len(self.draft)

    @property
    def shared(self) -> SharedPrompt | None:
        """The shared prompt that this part ends."""
        return self.sequence.shared if self.end == len(self.sequence.request.ids) else None


class Batch(NamedTuple):
    """One step.

    Attributes:
        prefill: whether prompts are read; otherwise each sequence continues from its newest token.
        parts: of the step; of a decode step part i is in slot i.
        one_step: draft tokens may come, so that no further step may follow before the host has seen this one.
    """

    prefill: bool
    parts: list[Part]
    one_step: bool = False

    @property
    def sequences(self) -> list[Sequence]:
        return [part.sequence for part in self.parts]

    def to_keep(self) -> dict[SharedPrompt, Part]:
        """Shared prompts whose reading ends in this step and that others want later; and by which part."""
        ending = [part for part in self.parts if part.shared is not None]
        first = {part.shared: part for part in reversed(ending) if part.source is None}
        return {
            shared: part
            for shared, part in first.items()
            if shared.unread > sum(other.shared is shared for other in ending)
        }


class Scheduler:
    """Sequences that wait and that run.

    Args:
        slots: sequences that run at the same time.
        chunk: tokens of a prompt that are read between two decode steps of the others.
        fits: whether there is memory for so many slots of such a length.
        speculation: proposes draft tokens for decode steps.

    Attributes:
        waiting: in order of arrival.
        running: sequence i holds slot i; those that decode stand before those whose prompts are not read yet.
    """

    def __init__(
        self,
        slots: int,
        chunk: int = PREFILL_TOKENS,
        fits: Callable[[int, int], bool] = lambda slots, length: True,
        speculation: Speculation | None = None,
    ):
        self.slots, self.chunk, self._fits, self.speculation = slots, chunk, fits, speculation
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._read = 0  # tokens of prompts since the last decode step

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """The next step; None where nothing can run, because not even the first request has memory."""
        self._admit()
        if not self.running:
            return None
        parts = self._chunks()
        if parts:
            self._read += sum(part.end - part.begin for part in parts if part.source is None)
            return Batch(True, parts)
        self._read = 0
        decoding = [sequence for sequence in self.running if sequence.decodes]
        if self.speculation is None or not self.speculation.may_propose(decoding):
            return Batch(False, [_decode(slot, sequence, []) for slot, sequence in enumerate(decoding)])
        drafts = self.speculation.propose(decoding)
        parts = [_decode(slot, *pair) for slot, pair in enumerate(zip(decoding, drafts, strict=True))]
        return Batch(False, parts, one_step=True)

    def postprocess(
        self, batch: Batch, sampled: list[Iterator[int]], steps: int = 1
    ) -> Iterator[tuple[Sequence, Token | Exception]]:
        """Give each sequence its new tokens. A sequence whose on_token raises ends with the exception instead.

        Args:
            batch: that was computed.
            sampled: tokens for each part; none where its prompt goes on.
            steps: that were computed in one go.
        """
        self._count(batch, steps)
        for part, tokens in zip(batch.parts, sampled, strict=True):
            sequence, draft = part.sequence, part.draft
            if batch.prefill:
                sequence.prefilled = part.end
                if part.end < len(sequence.request.ids):
                    continue
                sequence.leave_shared()
            length = len(sequence.ids)
            try:
                for token in sequence.append(tokens):
                    sequence.group.stats.decode_tokens += not batch.prefill
                    yield sequence, token
            except Exception as error:
                sequence.finish_reason = "cancelled"
                yield sequence, error
            if draft and self.speculation is not None:
                accepted = _accepted(draft, sequence.ids[length:])
                sequence.group.stats.proposed += len(draft)
                sequence.group.stats.accepted += accepted
                self.speculation.observe(sequence, length, len(draft), accepted)

    def release(self) -> Iterator[tuple[int, int]]:
        """Free the slots of sequences that have ended, and forget those that wait and were cancelled.

        Yields (source, target) of each sequence that changes its slot, in an order in which they can be copied.
        """
        if any(sequence.finish_reason for sequence in self.waiting):
            for sequence in self.waiting:
                if sequence.finish_reason:
                    sequence.leave_shared()
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.finish_reason)
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finish_reason:
                yield from self._free(slot)
        # those whose prompts have been read stand first
        decoding = sum(sequence.decodes for sequence in self.running)
        assert all(sequence.decodes for sequence in self.running[:decoding]), "prompts are read in the order of slots"

    def _free(self, slot: int) -> Iterator[tuple[int, int]]:
        ended = self.running[slot]
        ended.leave_shared()
        ended.proposer = None  # its tables: sequence and group refer to each other, which Python frees much later
        ended.group.running -= 1
        decoding = sum(sequence.decodes for sequence in self.running)
        if ended.decodes and slot < decoding - 1:
            self.running[slot] = self.running[decoding - 1]
            yield self._moved(decoding - 1, slot)
            slot = decoding - 1
        del self.running[slot]
        for source in range(slot + 1, len(self.running) + 1):  # those that wait for their prompts keep their order
            yield self._moved(source, source - 1)

    def _moved(self, source: int, target: int) -> tuple[int, int]:
        if self.speculation is not None:
            self.speculation.move(source, target)
        return source, target

    def _admit(self) -> None:
        """Give free slots to requests in order of arrival, as far as memory goes.

        A group that runs at its limit lets those behind it pass.
        """
        longest = max((sequence.request.length for sequence in self.running), default=0)
        left: deque[Sequence] = deque()
        while self.waiting and len(self.running) < self.slots:
            sequence = self.waiting.popleft()
            if sequence.group.running >= sequence.group.limit:
                left.append(sequence)
                continue
            length = max(longest, sequence.request.length)
            if not self._fits(len(self.running) + 1, length):
                left.append(sequence)
                break
            longest = length
            sequence.group.running += 1
            self.running.append(sequence)
        self.waiting.extendleft(reversed(left))

    def _chunks(self) -> list[Part]:
        """Parts of prompts to read now, in order of arrival: up to a chunk between two decode steps."""
        alone = not any(sequence.decodes for sequence in self.running)
        room = PREFILL_TOKENS if alone else self.chunk - self._read
        parts: list[Part] = []
        sources: dict[SharedPrompt, int] = {}  # slots of those whose prompts are read in this step
        for slot, sequence in enumerate(self.running):
            shared, prompt, begin = sequence.shared, len(sequence.request.ids), sequence.prefilled
            if shared is not None and not begin and (shared in sources or shared.kept is not None):
                source = KEPT if shared.kept is not None else sources[shared]
                if source != KEPT and prompt < len(sequence.known):
                    return parts  # what stands behind the prompt is read in the next step, from a copy
                parts.append(Part(sequence, slot, 0, prompt, [], source))
                begin = prompt
            while begin < len(sequence.known):
                # What is scored is a chunk of its own, so that it is computed alike behind a copied prompt.
                end = min(prompt if begin < prompt else len(sequence.known), (begin // self.chunk + 1) * self.chunk)
                if end - begin > room and (parts or not alone):
                    return parts
                parts.append(Part(sequence, slot, begin, end, []))
                room -= end - begin
                begin = end
            if shared is not None:
                sources.setdefault(shared, slot)
        return parts

    def _count(self, batch: Batch, steps: int) -> None:
        for group in {sequence.group for sequence in batch.sequences}:
            if batch.prefill:
                group.stats.prefill_steps += 1
            else:
                group.stats.decode_steps += steps
        for part in batch.parts if batch.prefill else ():
            part.sequence.group.stats.prefill_tokens += part.end - part.begin if part.source is None else 0


def _decode(slot: int, sequence: Sequence, draft: list[int]) -> Part:
    return Part(sequence, slot, len(sequence.ids) - 1, len(sequence.ids), draft)


def _accepted(draft: list[int], new: list[int]) -> int:
    """How many draft tokens stand at the beginning of what was drawn."""
    count = 0
    while count < min(len(draft), len(new)) and draft[count] == new[count]:
        count += 1
    return count
