"""What runs next: plain Python, driven here by any callers, slots and draft tokens without a network."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine import scheduler as module
from modelscope_dolly.engine.scheduler import KEPT, Batch, Part, Scheduler
from modelscope_dolly.engine.sequence import Group, Request, Sequence, SharedPrompt
from tests.support.source_imports import imports

STOP = 7


def script(number: int) -> list[int]:
    """What a scripted network says to request `number`, without end."""
    rng = random.Random(number)
    return [rng.randrange(20) for _ in range(50)]


def rest(sequence: Sequence) -> list[int]:
    """What it will say next."""
    return script(sequence.request.ids[0])[len(sequence.ids) - len(sequence.request.ids) :]


def sampled(batch: Batch) -> list[Iterator[int]]:
    """The scripted tokens of a step, draft tokens kept while they are right."""

    def tokens(part: Part) -> Iterator[int]:
        if given := part.sequence.request.given:
            behind = part.end - len(part.sequence.request.ids)
            yield from given[behind + 1 - part.rows : behind + 1]
            return
        for id, proposed in zip(rest(part.sequence), (*part.draft, None), strict=False):
            yield id
            if id != proposed:
                return

    return [tokens(part) for part in batch.parts]


class Guess:
    """Proposes some right and some wrong draft tokens."""

    def __init__(self, seed: int):
        self.rng, self.accepted = random.Random(seed), 0

    def may_propose(self, sequences: list[Sequence]) -> bool:
        return True

    def propose(self, sequences: list[Sequence]) -> list[list[int]]:
        counts = [self.rng.randint(0, max(0, min(4, sequence.remaining - 1))) for sequence in sequences]
        return [
            [id if self.rng.random() < 0.7 else 21 for id in rest(sequence)[:count]]
            for sequence, count in zip(sequences, counts, strict=True)
        ]

    def observe(self, sequence: Sequence, length: int, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed and len(sequence.ids) > length
        self.accepted += accepted

    def move(self, source: int, target: int) -> None:
        assert source > target


class Cache:
    """Which positions of which sequence each slot holds."""

    def __init__(self, keeps: random.Random):
        self.slots: dict[int, tuple[Sequence, int]] = {}
        self.keeps, self.read, self.copied = keeps, 0, 0

    def run(self, batch: Batch, scheduler: Scheduler) -> None:
        for place, part in enumerate(batch.parts):
            if part.source is not None:
                self.copy(batch, place)
            elif part.begin < len(part.sequence.request.ids):
                self.read += part.end - part.begin
            if part.begin:
                assert self.slots[part.slot] == (part.sequence, part.begin), "keys and values are somewhere else"
            if not batch.prefill:
                assert part.slot == place, "a decode step works on the first slots"
            self.slots[part.slot] = (part.sequence, part.end)
        assert all(scheduler.running[part.slot] is part.sequence for part in batch.parts)

    def copy(self, batch: Batch, place: int) -> None:
        part = batch.parts[place]
        prompt, shared = part.sequence.request.ids, part.sequence.shared
        assert (part.begin, part.end) == (0, len(prompt)) and part.slot != part.source
        if part.source == KEPT:
            assert shared.kept is prompt, "another prompt was kept"
        else:
            source, end = self.slots[part.source]
            assert source.request.ids is prompt and end >= len(prompt), "the prompt is not there"
            # It is copied after the step: nothing else of the step may stand on it.
            assert not any(other.begin and other.sequence is part.sequence for other in batch.parts)
        self.copied += len(prompt)

    def keep(self, batch: Batch) -> None:
        """As the runner does, where there is memory."""
        for shared, part in batch.to_keep().items():
            assert part.end == len(part.sequence.request.ids) and part.source is None
            if self.keeps.random() < 0.8:
                shared.kept = part.sequence.request.ids

    def settle(self, scheduler: Scheduler) -> None:
        """After a step: rejected draft tokens do not count, and some sequences have moved."""
        for slot, (sequence, end) in self.slots.items():
            self.slots[slot] = (sequence, end if not sequence.decodes else max(end, len(sequence.ids) - 1))
        for source, target in scheduler.release():
            if source in self.slots:
                self.slots[target] = self.slots[source]


CALLERS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=6),  # its requests
        st.integers(1, 4),  # its limit
        st.integers(0, 20),  # steps until it comes
        st.none() | st.integers(0, 15),  # steps until it goes away
        st.booleans(),  # whether its requests have the same prompt
        st.integers(0, 12),  # of its first answer, so many tokens are given: to be scored
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=200)
@given(CALLERS, st.integers(1, 8), st.sampled_from([4, 16, 64]), st.none() | st.integers(0, 5), st.integers(60, 900))
def test_every_request_gets_its_own_tokens_whoever_comes_and_goes_beside_it(callers, slots, chunk, seed, memory):
    speculation = None if seed is None else Guess(seed)
    scheduler = Scheduler(slots, chunk, lambda used, length: used == 1 or used * length <= memory, speculation)
    cache, got, calls = Cache(random.Random(slots)), {}, []
    number = step = 0
    while step <= 20 or not scheduler.idle:
        for requests, limit, arrival, leaves, same, scored in callers:
            if arrival == step:
                group, sequences, shared = Group(limit), [], SharedPrompt() if same else None
                for index, (prompt, new) in enumerate(requests):
                    number += not same or not index
                    ids = sequences[0].request.ids if same and index else [number] * prompt
                    given = tuple(range(100, 100 + new)) if scored > index else ()
                    request = Request(ids, new, stop_ids=frozenset({STOP}) - set(given), given=given)
                    sequences.append(Sequence(index, request, group, shared))
                    scheduler.add(sequences[-1])
                    got[sequences[-1]] = []
                calls.append((group, sequences, None if leaves is None else step + leaves))
        for _, sequences, leaves in calls:
            if leaves == step:
                for sequence in sequences:
                    sequence.finish_reason = sequence.finish_reason or "cancelled"
        cache.settle(scheduler)
        batch = scheduler.schedule()
        step += 1
        assert step < 5000
        if batch is None:
            assert scheduler.idle
            continue
        assert 0 < len(scheduler.running) <= slots
        assert all(group.running <= group.limit for group, _, _ in calls)
        length = max(sequence.request.length for sequence in scheduler.running)
        assert len(scheduler.running) == 1 or len(scheduler.running) * length <= memory
        decodes = [sequence for sequence in scheduler.running if sequence.decodes]
        if batch.prefill:
            read = sum(part.end - part.begin for part in batch.parts if part.source is None)
            assert read <= (chunk if decodes else max(module.PREFILL_TOKENS, chunk))
            # chunks lie alike whatever runs beside them
            for part in batch.parts:
                prompt = len(part.sequence.request.ids)
                assert part.source is not None or part.end - part.begin <= chunk
                assert part.begin % chunk == 0 or part.begin == prompt
                assert part.end % chunk == 0 or part.end in (prompt, len(part.sequence.known))
        else:
            assert batch.sequences == decodes
        cache.run(batch, scheduler)
        cache.keep(batch)
        for sequence, token in scheduler.postprocess(batch, sampled(batch)):
            got[sequence].append(token.id)
        cache.settle(scheduler)
    for sequence, ids in got.items():
        whole = list(sequence.request.given) or script(sequence.request.ids[0])[: sequence.request.max_new_tokens]
        whole = whole[: whole.index(STOP) + 1] if STOP in whole else whole
        assert ids == (whole[: len(ids)] if sequence.finish_reason == "cancelled" else whole)
        assert sequence.finish_reason
    assert all(group.running == 0 for group, _, _ in calls)
    # Nothing of a shared prompt is held on to.
    assert all(sequence.shared is None for sequence in got)


def run_alone(requests: list[Request], slots: int, **options) -> list[list[tuple[int, int]]]:
    """(begin, end) of each part of each step."""
    scheduler, steps = Scheduler(slots, **options), []
    group = Group(slots)
    for index, request in enumerate(requests):
        scheduler.add(Sequence(index, request, group))
    while not scheduler.idle:
        batch = scheduler.schedule()
        steps.append([(part.begin, part.end) for part in batch.parts])
        list(scheduler.postprocess(batch, sampled(batch)))
        list(scheduler.release())
    return steps


def test_prompts_are_admitted_up_to_the_limit_of_a_prefill(monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 100)
    steps = run_alone([Request([n] * n, 1) for n in (60, 30, 20, 150, 5)], 8, chunk=1000)
    assert steps == [[(0, 60), (0, 30)], [(0, 20)], [(0, 150)], [(0, 5)]]


def test_a_long_prompt_is_read_in_chunks_between_the_steps_of_the_others():
    first, long = Request([1] * 3, 9), Request([2] * 50, 2)
    steps = run_alone([first, long], 2, chunk=20)
    assert steps[0] == [(0, 3), (0, 20), (20, 40), (40, 50)]  # nobody waits for a step
    scheduler, group = Scheduler(2, 20), Group(2)
    scheduler.add(Sequence(0, first, group))
    kinds = []
    for number in range(8):
        if number == 2:
            scheduler.add(Sequence(1, long, group))
        batch = scheduler.schedule()
        kinds.append([(part.begin, part.end) for part in batch.parts] if batch.prefill else len(batch.parts))
        list(scheduler.postprocess(batch, sampled(batch)))
        list(scheduler.release())
    assert kinds == [[(0, 3)], 1, [(0, 20)], 1, [(20, 40)], 1, [(40, 50)], 2]


def test_a_callback_that_raises_ends_its_own_sequence_alone():
    def fail(token: int) -> bool:
        raise KeyError("no")

    scheduler, groups = Scheduler(2), (Group(1), Group(1))
    scheduler.add(Sequence(0, Request([1], 5, on_token=fail), groups[0]))
    scheduler.add(Sequence(0, Request([2], 5), groups[1]))
    batch = scheduler.schedule()
    (bad, error), (good, token) = scheduler.postprocess(batch, sampled(batch))
    assert isinstance(error, KeyError) and bad.finish_reason == "cancelled"
    assert good.finish_reason is None and token.id == script(2)[0]


def test_the_scheduler_names_no_tensor():
    assert not [name for name in imports(Path(module.__file__)) if name.startswith("torch")]


def reads(sequences: list[Sequence], slots: int) -> list[list[tuple[int, int, int | None]]]:
    """(begin, end, source) of the parts of each step over prompts; what is to be kept is kept."""
    scheduler, steps = Scheduler(slots, 20), []
    for sequence in sequences:
        scheduler.add(sequence)
    while not scheduler.idle:
        batch = scheduler.schedule()
        if batch.prefill:
            steps.append([(part.begin, part.end, part.source) for part in batch.parts])
        for shared in batch.to_keep():
            shared.kept = "keys and values"
        list(scheduler.postprocess(batch, sampled(batch)))
        list(scheduler.release())
    return steps


def shared_by(count: int, given: tuple[int, ...] = ()) -> list[Sequence]:
    group, shared, ids = Group(9), SharedPrompt(), [1] * 25
    return [Sequence(n, Request(ids, len(given) or 2, given=given), group, shared) for n in range(count)]


def test_a_shared_prompt_is_read_once_whatever_the_slots():
    assert reads(shared_by(3), slots=3) == [[(0, 20, None), (20, 25, None), (0, 25, 0), (0, 25, 0)]]
    assert reads(shared_by(3), slots=1) == [[(0, 20, None), (20, 25, None)], [(0, 25, KEPT)], [(0, 25, KEPT)]]
    assert reads(shared_by(1), slots=3) == [[(0, 20, None), (20, 25, None)]]


def test_what_is_scored_behind_a_shared_prompt_is_read_alike_for_each():
    first, *others = reads(shared_by(3, given=(4, 5, 6)), slots=3)
    assert first == [(0, 20, None), (20, 25, None), (25, 27, None)]
    assert others == [[(0, 25, KEPT), (25, 27, None)] * 2]
    assert reads(shared_by(2, given=(4,)), slots=2) == [[(0, 20, None), (20, 25, None), (0, 25, 0)]]


def test_the_next_one_reads_a_shared_prompt_when_the_first_goes_away():
    first, second = shared_by(2)
    scheduler = Scheduler(3, 20)
    scheduler.add(Sequence(0, Request([9], 30), Group(1)))
    list(scheduler.postprocess(batch := scheduler.schedule(), sampled(batch)))
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(2):  # a decode step, the first chunk
        list(scheduler.postprocess(batch := scheduler.schedule(), sampled(batch)))
    assert first.prefilled == 20 and second.prefilled == 0
    first.finish_reason = "cancelled"
    list(scheduler.release())
    while not second.decodes:
        batch = scheduler.schedule()
        list(scheduler.postprocess(batch, sampled(batch)))
    assert scheduler.running[1] is second and second.shared is None
