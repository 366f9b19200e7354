"""How many draft tokens a step verifies, against a search over all choices; acceptance rates."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine.speculative.policy import MAX_DRAFT_TOKENS, AcceptanceRate, draft_lengths
from modelscope_dolly.engine.step_timer import StepTimer
from tests.support.timers import measured


def test_a_rate_begins_at_its_prior_and_forgets():
    rate = AcceptanceRate(0.3)
    assert rate.value == pytest.approx(0.3)
    for _ in range(60):
        rate.add(True)
    assert rate.value > 0.95
    for _ in range(60):
        rate.add(False)
    assert rate.value < 0.05


def flat(size: int = 64) -> StepTimer:
    return measured(n1=1.0, **{f"n{size}": 1.0})


def steep() -> StepTimer:
    """Each token takes as long as a step, as where arithmetic is the limit."""
    return measured(n1=1.0, n2=2.0, n16=16.0, n64=64.0)


def test_rows_that_cost_nothing_are_filled_and_expensive_ones_are_not():
    offers = [[0.9] * MAX_DRAFT_TOKENS]
    assert draft_lengths(offers, flat())[0] == [MAX_DRAFT_TOKENS]
    assert draft_lengths(offers, steep())[0] == [0]
    assert draft_lengths([[0.05] * MAX_DRAFT_TOKENS], flat())[0] == [0]  # hardly ever right


def test_without_offers_nothing_is_verified():
    assert draft_lengths([[], []], flat()) == ([0, 0], pytest.approx(2.0))


def test_the_sequence_with_the_better_draft_gets_the_rows():
    timer = measured(n3=1.0, n8=1.6, n64=12.8)
    good, poor, none = draft_lengths([[0.95] * 8, [0.3] * 8, []], timer)[0]
    assert good > poor and none == 0


def best_by_search(offers, timer, drafted, draft_seconds) -> float:
    speeds = []
    for counts in itertools.product(*(range(len(probabilities) + 1) for probabilities in offers)):
        expected = len(offers)
        for count, probabilities in zip(counts, offers, strict=True):
            for place in range(count):
                reach = 1.0
                for one in probabilities[: place + 1]:
                    reach *= one
                expected += reach
        depth = max((counts[place] for place in drafted), default=0)
        speeds.append(expected / (timer.seconds(len(offers) + sum(counts)) + depth * draft_seconds))
    return max(speeds)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.floats(0.3, 1.0), max_size=3), min_size=1, max_size=3),
    st.floats(0.0, 0.5),
)
def test_the_choice_is_as_fast_as_the_best_of_all(offers, slope):
    timer = measured(**{f"n{n}": 1.0 + slope * (n - 1) for n in (1, 2, 32)})
    likely = [[c for i, c in enumerate(probabilities) if _reached(probabilities, i) >= 0.1] for probabilities in offers]
    best = best_by_search(likely, timer, (), 0.0)
    assert draft_lengths(offers, timer)[1] >= best / 1.021


def _reached(probabilities, place) -> float:
    reach = 1.0
    for one in probabilities[: place + 1]:
        reach *= one
    return reach


def test_an_expensive_draft_is_not_used_and_a_cheap_one_is_not_deeper_than_it_pays():
    assert draft_lengths([[0.8] * MAX_DRAFT_TOKENS], flat(), drafted=[0], draft_seconds=1.0)[0] == [0]
    assert draft_lengths([[0.8] * MAX_DRAFT_TOKENS], flat(), drafted=[0], draft_seconds=0.001)[0] == [
        10
    ]  # 0.8 ** 11 < 0.1
    assert 1 <= draft_lengths([[0.8] * MAX_DRAFT_TOKENS], flat(), drafted=[0], draft_seconds=0.2)[0][0] <= 5


def test_the_first_steps_grow_step_by_step():
    timer = StepTimer()
    sizes = []
    for _ in range(40):
        tokens = 1 + draft_lengths([[0.99] * MAX_DRAFT_TOKENS], timer)[0][0]
        sizes.append(tokens)
        timer.add(tokens, 1.0)
    assert sizes[-1] == 1 + MAX_DRAFT_TOKENS
    assert all(later <= 2 * max(sizes[: i + 1]) for i, later in enumerate(sizes[1:]))


def test_where_rows_are_expensive_few_are_spent_to_learn_it():
    timer, spent = StepTimer(), 0.0
    for step in range(200):
        tokens = 1 + draft_lengths([[0.6] * MAX_DRAFT_TOKENS], timer, idle=step % 65)[0][0]
        timer.add(tokens, float(tokens))
        spent += tokens
    assert spent / 200 < 1.05


def test_a_likely_draft_is_tried_again_after_a_while():
    assert draft_lengths([[0.9] * 4], steep(), idle=63)[0] == [0]
    assert draft_lengths([[0.9] * 4], steep(), idle=64)[0] == [1]
    assert draft_lengths([[0.4] * 4], steep(), idle=1000)[0] == [0]
