"""The batch plan: which records go into which forward pass of which rank, for the whole run, before it starts.

Like the public recipe, each optimizer step sees `global_batch_size` whole records, drawn without replacement from a
seeded order. Unlike it, nothing is padded: the records of a step are balanced so that every forward pass on every rank
has about the same number of tokens (longest first into the emptiest pass: Graham 1969, "LPT"), and are laid end to end.

The plan is a pure function of the lengths and the settings. Its hash goes into every checkpoint, so that a resumed run
can verify that it continues the same plan.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from modelscope_dolly.errors import SettingError

#: Records in all epochs together: 333 times those of the public recipe. More would be planned for many minutes.
MOST_RECORDS = 10_000_000
#: Records of one forward pass. An empty one runs a single token that has no label: all ranks must take part.
Pass = tuple[int, ...]
#: [step][rank][micro-step] -> a pass.
Steps = tuple[tuple[tuple[Pass, ...], ...], ...]


class LargestPass(NamedTuple):
    """The forward pass with the most tokens in the run; of several, the first."""

    tokens: int
    step: int
    rank: int
    micro_step: int


@dataclass(frozen=True)
class BatchPlan:
    """Steps of the whole run.

    Attributes:
        steps: [step][rank][micro-step] -> indices of records. Every rank takes the same number of micro-steps in every
            step, as DeepSpeed requires: `accumulation`. `world` is the number of ranks.
        loads: the tokens that each of these passes processes, padding included.
        step_tokens: tokens in the records of each step; `tokens` is their sum.
    """

    steps: Steps
    loads: tuple[tuple[tuple[int, ...], ...], ...]
    step_tokens: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.steps[0])

    @property
    def accumulation(self) -> int:
        return len(self.steps[0][0])

    @property
    def tokens(self) -> int:
        return sum(self.step_tokens)

    @cached_property
    def processed(self) -> int:
        """Tokens that the ranks work on, padding included."""
        return sum(sum(map(sum, step)) for step in self.loads)

    @cached_property
    def waited(self) -> int:
        """`processed`, if every rank took as long as the busiest one of each pass; it does when ranks synchronize."""
        return self.world * sum(sum(map(max, zip(*step, strict=True))) for step in self.loads)

    @cached_property
    def largest(self) -> LargestPass:
        indices = itertools.product(range(len(self.steps)), range(self.accumulation), range(self.world))
        passes = (LargestPass(self.loads[step][rank][micro], step, rank, micro) for step, micro, rank in indices)
        return max(passes, key=lambda entry: entry.tokens)

    @property
    def hash(self) -> str:
        """SHA-256 of the assignment."""
        return _sha256(self.steps)

    @property
    def order_hash(self) -> str:
        """SHA-256 of which records make each step and how long they are: the same on any number of ranks."""
        contents = [sorted(i for rank in step for records in rank for i in records) for step in self.steps]
        return _sha256([contents, self.step_tokens])

    def first_steps(self, count: int) -> BatchPlan:
        """The plan cut to its first `count` steps."""
        return BatchPlan(self.steps[:count], self.loads[:count], self.step_tokens[:count])

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
            "largest_pass_tokens": self.largest.tokens,
            "plan_hash": self.hash,
        }


def make_plan(steps: Steps, lengths: Sequence[int], load: Callable[[list[int]], int] = sum) -> BatchPlan:
    """The plan with these steps.

    Args:
        steps: [step][rank][micro-step] -> indices of records.
        lengths: tokens of each record.
        load: lengths of the records of one pass -> tokens that it processes; never called for an empty pass.
    """
    loads = tuple(
        tuple(tuple(load([lengths[i] for i in records]) if records else 1 for records in rank) for rank in step)
        for step in steps
    )
    step_tokens = (sum(_tokens(records, lengths) for rank in step for records in rank) for step in steps)
    return BatchPlan(steps, loads, tuple(step_tokens))


def global_batches(lengths: Sequence[int], seed: int, epochs: int, size: int, world: int) -> list[list[int]]:
    """Records of each step: a new order for each epoch, cut into `size`; the last step of an epoch may be smaller.

    The order comes from Python's Mersenne Twister, seeded by text, which is the same on every machine and version.

    Raises:
        SettingError: there are no records, too many over all epochs, or fewer in a step than ranks.
    """
    if not lengths:
        raise SettingError("there is no record to train on")
    if epochs * len(lengths) > MOST_RECORDS:
        raise SettingError(
            f"epochs is {epochs}: with {len(lengths):,} records it must be at most {MOST_RECORDS // len(lengths):,}, "
            f"for {MOST_RECORDS:,} records in all"
        )
    if size < world:
        raise SettingError(f"global_batch_size is {size}, it must be at least the number of ranks, {world}")
    batches = []
    for epoch in range(epochs):
        order = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        batches += [order[begin : begin + size] for begin in range(0, len(order), size)]
    return batches


def packed_plan(
    lengths: Sequence[int], seed: int, epochs: int, global_batch_size: int, world: int, tokens_per_batch: int
) -> BatchPlan:
    """Plan without padding.

    Args:
        lengths: tokens of each record.
        seed, epochs, global_batch_size: which records make a step.
        world: ranks.
        tokens_per_batch: most tokens in one forward pass.

    Raises:
        SettingError: a record is longer than tokens_per_batch, or see global_batches.
    """
    batches = global_batches(lengths, seed, epochs, global_batch_size, world)
    if max(lengths) > tokens_per_batch:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise SettingError(
            f"record {longest} has {lengths[longest]} tokens, more than tokens_per_batch {tokens_per_batch}; "
            "raise that or lower max_length"
        )
    # At the least, passes that are full; from there it grows to what the fullest step needs, which LPT fills evenly.
    accumulation = max(-(-_tokens(batch, lengths) // (world * tokens_per_batch)) for batch in batches)
    for batch in batches:
        while _tokens(balance(batch, lengths, world * accumulation)[0], lengths) > tokens_per_batch:
            accumulation += 1
    steps = []
    for batch in batches:
        passes = balance(batch, lengths, world * accumulation)
        # Passes of similar size run at the same time on different ranks, so that no rank waits long.
        steps.append(tuple(tuple(passes[rank::world]) for rank in range(world)))
    return make_plan(tuple(steps), lengths)


def balance(batch: Sequence[int], lengths: Sequence[int], parts: int) -> list[Pass]:
    """Split records into `parts` passes of about equal tokens: the longest first, each into the emptiest pass.

    Returns the passes with the most tokens first; the records of each in the order of `batch`.
    """
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(parts)]
    position = {record: i for i, record in enumerate(batch)}
    for record in sorted(batch, key=lambda record: (-lengths[record], position[record])):
        load, number, records = heapq.heappop(heap)
        heapq.heappush(heap, (load + lengths[record], number, [*records, record]))
    heap.sort(key=lambda entry: (-entry[0], entry[1]))
    return [tuple(sorted(records, key=position.__getitem__)) for _, _, records in heap]


def _tokens(records: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in records)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
