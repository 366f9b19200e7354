"""What runs next: plain Python, driven here by any requests, slots and draft tokens without a network."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine import scheduler as module
from modelscope_dolly.engine.scheduler import Batch, Scheduler
from modelscope_dolly.engine.sequence import Request, RunStats, Sequence
from tests.support.source_imports import imports

STOP = 7


def answer(index: int) -> list[int]:
    """What a scripted network says to request `index`, without end."""
    rng = random.Random(index)
    return [rng.randrange(20) for _ in range(50)]


def sampled(batch: Batch) -> list[Iterator[int]]:
    """The scripted tokens of a step, draft tokens kept while they are right."""

    def tokens(sequence: Sequence, draft: list[int]) -> Iterator[int]:
        script = answer(sequence.index)[len(sequence.ids) - len(sequence.request.ids) :]
        for id, proposed in zip(script, (*draft, None), strict=False):
            yield id
            if id != proposed:
                return

    return [tokens(*pair) for pair in zip(batch.sequences, batch.draft, strict=True)]


class Guess:
    """Proposes some right and some wrong draft tokens; keeps track of which sequence holds which slot."""

    def __init__(self, seed: int):
        self.rng, self.held, self.observed = random.Random(seed), {}, 0

    def may_propose(self, sequences: list[Sequence]) -> bool:
        return True

    def propose(self, sequences: list[Sequence]) -> list[list[int]]:
        self.held = {slot: sequence.index for slot, sequence in enumerate(sequences)}
        drafts = []
        for sequence in sequences:
            script = answer(sequence.index)[len(sequence.ids) - len(sequence.request.ids) :]
            count = self.rng.randint(0, max(0, min(4, sequence.remaining - 1)))
            drafts.append([id if self.rng.random() < 0.7 else 21 for id in script[:count]])
        return drafts

    def observe(self, sequence: Sequence, length: int, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed and len(sequence.ids) > length
        self.observed += accepted

    def move(self, source: int, target: int) -> None:
        assert source > target


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), max_size=25),
    st.integers(1, 8),
    st.none() | st.integers(0, 5),
)
def test_every_request_gets_its_own_tokens_in_order_whatever_runs_beside_it(sizes, slots, seed):
    requests = [Request([1] * prompt, new, stop_ids=frozenset({STOP})) for prompt, new in sizes]
    stats, speculation = RunStats(), None if seed is None else Guess(seed)
    scheduler = Scheduler(requests, slots, stats, speculation)
    got: list[list[int]] = [[] for _ in requests]
    admitted: list[int] = []
    holders: dict[int, int] = {}  # slot -> sequence
    while not scheduler.finished:
        batch = scheduler.schedule()
        assert 0 < len(scheduler.running) <= slots
        if batch.prefill:
            admitted.extend(sequence.index for sequence in batch.sequences)
            assert batch.first_slot + len(batch.sequences) == len(scheduler.running)
        else:  # slots are never idle while requests wait
            assert len(scheduler.running) == slots or not scheduler.waiting
            assert batch.sequences == scheduler.running
        holders.update({batch.first_slot + i: sequence.index for i, sequence in enumerate(batch.sequences)})
        for token in scheduler.postprocess(batch, sampled(batch)):
            got[token.index].append(token.id)
        for source, target in scheduler.release():
            holders[target] = holders.pop(source)
        # after the moves each sequence is where its keys and values are
        assert all(holders[slot] == sequence.index for slot, sequence in enumerate(scheduler.running))
    assert admitted == list(range(len(requests)))
    for index, (request, ids) in enumerate(zip(requests, got, strict=True)):
        script = answer(index)[: request.max_new_tokens]
        assert ids == (script[: script.index(STOP) + 1] if STOP in script else script)
    assert stats.prefill_tokens == sum(prompt for prompt, _ in sizes)
    assert stats.decode_tokens == sum(map(len, got)) - len(got)
    assert stats.accepted == (speculation.observed if speculation else 0) <= stats.proposed


def test_prompts_are_admitted_up_to_the_limit_of_a_prefill(monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 100)
    scheduler = Scheduler([Request([1] * n, 1) for n in (60, 30, 20, 150, 5)], 8, RunStats())
    batches = []
    while not scheduler.finished:
        batch = scheduler.schedule()
        batches.append([len(sequence.request.ids) for sequence in batch.sequences])
        list(scheduler.postprocess(batch, sampled(batch)))
        list(scheduler.release())
    assert batches == [[60, 30], [20], [150], [5]]


def test_the_scheduler_names_no_tensor():
    assert not [name for name in imports(Path(module.__file__)) if name.startswith("torch")]
