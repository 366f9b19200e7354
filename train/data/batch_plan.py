"""The batch plan: which records go into which forward pass of which rank, for the whole run, before it starts.

Like the public recipe, each optimizer step sees `global_batch_size` whole records, drawn without replacement from a
seeded order. Unlike it, nothing is padded: the records of a step are dealt out so that every forward pass on every rank
has about the same number of tokens (longest first into the emptiest pass: Graham 1969, "LPT"), and are laid end to end.

The plan is a pure function of the lengths and the settings. Its hash goes into every checkpoint, so that a resumed run
can prove that it goes on with the same plan.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from modelscope_dolly.errors import SettingError

#: Padded batches are as long as their longest record, rounded up to this, as in the public recipe.
PAD_MULTIPLE = 8

#: Records of one forward pass. An empty one is run with a single token that has no label: all ranks must take part.
Pass = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Steps of the whole run.

    Attributes:
        steps: [step][rank][accumulation] -> indices of records.
        world: ranks.
        accumulation: forward passes of one rank in one step; the same in every step, as DeepSpeed wants it.
        tokens: in all records of all steps.
        step_tokens: in the records of each step.
        processed: tokens that ranks work on, padding included.
        waited: the same, counted as if every rank took as long as the busiest one of each pass, which it does when
            gradients or weights are exchanged.
        largest: the most tokens in one forward pass, and where it is: (tokens, step, rank, accumulation).
    """

    steps: tuple[tuple[tuple[Pass, ...], ...], ...]
    world: int
    accumulation: int
    tokens: int
    processed: int
    waited: int
    step_tokens: tuple[int, ...]
    largest: tuple[int, int, int, int]

    @property
    def hash(self) -> str:
        """SHA-256 of the assignment."""
        return _sha256(self.steps)

    @property
    def order_hash(self) -> str:
        """SHA-256 of which records make each step and how long they are: the same on any number of ranks."""
        contents = [sorted(i for rank in step for records in rank for i in records) for step in self.steps]
        return _sha256([contents, self.step_tokens])

    def shortened(self, steps: int, lengths: Sequence[int], padded: bool) -> Plan:
        """The first `steps` steps only."""
        return _measured(self.steps[:steps], self.world, self.accumulation, lengths, padded)

    def summary(self) -> dict:
        """Figures for people and for run.json."""
        return {
            "steps": len(self.steps),
            "world": self.world,
            "accumulation": self.accumulation,
            "tokens": self.tokens,
            "processed_tokens": self.processed,
            "useful_share": round(self.tokens / self.processed, 4),
            "useful_share_with_waiting": round(self.tokens / self.waited, 4),
            "largest_pass_tokens": self.largest[0],
            "plan_hash": self.hash,
        }


def global_batches(count: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Records of each step: a new order for each epoch, cut into `size`; the last step of an epoch may be smaller.

    The order comes from Python's Mersenne Twister, seeded by text, which is the same on every machine and version.
    """
    batches = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        batches += [order[begin : begin + size] for begin in range(0, count, size)]
    return batches


def packed_plan(
    lengths: Sequence[int], seed: int, epochs: int, global_batch_size: int, world: int, tokens_per_batch: int
) -> Plan:
    """Plan without padding.

    Args:
        lengths: tokens of each record.
        seed, epochs, global_batch_size: which records make a step.
        world: ranks.
        tokens_per_batch: most tokens in one forward pass.

    Raises:
        SettingError: a record is longer than tokens_per_batch, or there are no records.
    """
    _check(lengths, world, global_batch_size)
    if max(lengths) > tokens_per_batch:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise SettingError(
            f"record {longest} has {lengths[longest]} tokens, more than tokens_per_batch {tokens_per_batch}; "
            "raise that or lower max_length"
        )
    batches = global_batches(len(lengths), global_batch_size, epochs, seed)
    accumulation = 1
    for batch in batches:  # grows to what the fullest step needs; LPT fills any number of passes evenly
        while max(_load(part, lengths) for part in deal(batch, lengths, world * accumulation)) > tokens_per_batch:
            accumulation += 1
    steps = tuple(_share_out(deal(batch, lengths, world * accumulation), lengths, world) for batch in batches)
    return _measured(steps, world, accumulation, lengths, padded=False)


def padded_plan(
    lengths: Sequence[int], seed: int, epochs: int, global_batch_size: int, world: int, records_per_batch: int
) -> Plan:
    """Plan as in 2023, for comparison: the same steps, records dealt out in order, each pass padded to its longest.

    Raises:
        SettingError: the global batch is not a multiple of the ranks' passes.
    """
    _check(lengths, world, global_batch_size)
    if global_batch_size % (world * records_per_batch):
        raise SettingError(
            f"global_batch_size is {global_batch_size}, it must be a multiple of {world} ranks x padded_batch_size "
            f"{records_per_batch} = {world * records_per_batch}"
        )
    accumulation = global_batch_size // (world * records_per_batch)
    steps = []
    for batch in global_batches(len(lengths), global_batch_size, epochs, seed):
        parts = [tuple(batch[begin : begin + records_per_batch]) for begin in range(0, len(batch), records_per_batch)]
        parts += [()] * (world * accumulation - len(parts))
        steps.append(tuple(tuple(parts[rank::world]) for rank in range(world)))
    return _measured(tuple(steps), world, accumulation, lengths, padded=True)


def deal(batch: Sequence[int], lengths: Sequence[int], parts: int) -> list[Pass]:
    """Split records into `parts` passes of about equal tokens: the longest first, each into the emptiest pass.

    Returns the passes with the most tokens first; the records of each in the order of `batch`.
    """
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(parts)]
    place = {record: i for i, record in enumerate(batch)}
    for record in sorted(batch, key=lambda record: (-lengths[record], place[record])):
        load, number, records = heapq.heappop(heap)
        heapq.heappush(heap, (load + lengths[record], number, [*records, record]))
    heap.sort(key=lambda entry: (-entry[0], entry[1]))
    return [tuple(sorted(records, key=place.__getitem__)) for _, _, records in heap]


def _share_out(passes: list[Pass], lengths: Sequence[int], world: int) -> tuple[tuple[Pass, ...], ...]:
    """[rank][accumulation]: neighbours in size run at the same time on different ranks, so that none waits long."""
    return tuple(tuple(passes[rank::world]) for rank in range(world))


def _load(records: Pass, lengths: Sequence[int], padded: bool = False) -> int:
    """Tokens of one forward pass."""
    if not records:
        return 1
    if padded:
        longest = max(lengths[record] for record in records)
        return len(records) * -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    return sum(lengths[record] for record in records)


def _check(lengths: Sequence[int], world: int, global_batch_size: int) -> None:
    if not lengths:
        raise SettingError("there is no record to train on")
    if global_batch_size < world:
        raise SettingError(
            f"global_batch_size is {global_batch_size}, it must be at least the number of ranks, {world}"
        )


def _measured(steps: tuple, world: int, accumulation: int, lengths: Sequence[int], padded: bool) -> Plan:
    step_tokens = []
    processed = waited = 0
    largest = (0, 0, 0, 0)
    for number, ranks in enumerate(steps):
        for turn in range(accumulation):
            loads = [_load(ranks[rank][turn], lengths, padded) for rank in range(world)]
            processed += sum(loads)
            waited += world * max(loads)
            for rank, load in enumerate(loads):
                if load > largest[0]:
                    largest = (load, number, rank, turn)
        step_tokens.append(sum(lengths[record] for rank in ranks for records in rank for record in records))
    return Plan(steps, world, accumulation, sum(step_tokens), processed, waited, tuple(step_tokens), largest)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
