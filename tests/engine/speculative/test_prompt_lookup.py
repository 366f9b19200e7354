"""Guessing: the lookup against a naive search, measured rates and costs, and how many guesses a pass verifies."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine.speculative.prompt_lookup import MOST, PassCost, PromptLookup, Rate, plan

texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def naive_match(ids: list[int]) -> tuple[int, int]:
    """(length, place after) of the longest end of `ids` that occurred before, at its last occurrence."""
    for length in range(min(PromptLookup.LONGEST, len(ids) - 1), 0, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[-length:]:
                return length, end
    return 0, 0


@settings(deadline=None, max_examples=300)
@given(texts, st.integers(0, 60))
def test_the_match_is_that_of_a_naive_search_after_each_token(ids, prompt):
    lookup = PromptLookup(ids[:prompt])
    for end in range(min(prompt, len(ids)), len(ids)):
        lookup.add(ids[end])
        length, place = lookup.match()
        assert length == naive_match(ids[: end + 1])[0]
        assert not length or place == naive_match(ids[: end + 1])[1]


@settings(deadline=None, max_examples=200)
@given(texts, st.integers(1, 70))
def test_the_guess_is_what_followed_and_then_repeats_itself(ids, most):
    guess, chances = PromptLookup(ids).guess(most)
    length, place = naive_match(ids)
    text = list(ids)
    for offset in range(most if length else 0):
        text.append(text[place + offset])
    assert guess == text[len(ids) :]
    assert len(chances) == len(guess) and all(0 <= chance <= 1 for chance in chances)


def test_a_copied_passage_is_guessed_after_its_first_token():
    passage = list(range(100, 140))
    lookup = PromptLookup([1, 2, 3, *passage, 4, 5])
    lookup.add(passage[0])
    assert lookup.guess(10)[0] == passage[1:11]
    # as the match grows longer the guess is worth more
    first = lookup.guess(1)[1][0]
    for token in passage[1:6]:
        lookup.add(token)
    assert lookup.guess(10)[0] == passage[6:16]
    assert lookup.guess(1)[1][0] > max(first, 0.7)


def test_chances_follow_what_came_whether_or_not_it_was_verified():
    right, wrong = PromptLookup([1, 2, 3, 4] * 3), PromptLookup([7, 8, 9, 10] * 3)
    before = right.guess(1)[1]
    assert before == wrong.guess(1)[1]
    for step in range(12):
        right.add(1 + step % 4)
        for token in (7, 8, 100 + step):  # 7 is followed by 8 as before, 8 never by what followed it
            wrong.add(token)
    wrong.add(7)
    after_seven = wrong.guess(1)[1]
    wrong.add(8)
    assert right.guess(1)[1] > before and right.guess(1)[1][0] > 0.85
    assert after_seven[0] > 0.6 and wrong.guess(1)[1][0] < 0.15


def test_no_match_makes_no_guess():
    assert PromptLookup([]).guess(5) == ([], [])
    assert PromptLookup(list(range(50))).guess(5) == ([], [])


def test_building_the_index_looks_at_each_token_a_constant_number_of_times():
    lookup = PromptLookup([5] * 4000 + list(range(4000)))
    assert len(lookup._after) <= PromptLookup.LONGEST * 8000


def test_a_rate_begins_at_its_prior_and_forgets():
    rate = Rate(0.3)
    assert rate.value == pytest.approx(0.3)
    for _ in range(60):
        rate.add(True)
    assert rate.value > 0.95
    for _ in range(60):
        rate.add(False)
    assert rate.value < 0.05


def measured(**times: float) -> PassCost:
    """Costs known for the given sizes: measured(n1=0.1, n4=0.2)."""
    cost = PassCost()
    for name, seconds in times.items():
        for _ in range(3):
            cost.add(int(name[1:]), seconds)
    return cost


def test_cost_is_the_median_and_the_first_pass_of_a_size_does_not_count():
    cost = PassCost()
    cost.add(4, 100.0)
    cost.add(4, 70.0)  # nor does a single one
    assert cost.largest == 0
    cost.add(4, 1.0)
    assert (cost(4), cost.largest) == (1.0, 4)
    for seconds in (1.2, 50.0, 1.1, 0.9):
        cost.add(4, seconds)
    assert (cost(4), cost.largest) == (1.1, 4)
    for _ in range(5):
        cost.add(4, 3.0)  # the machine has become slower
    assert cost(4) == 3.0


def test_cost_between_and_beyond_measured_sizes_is_on_the_line_through_them():
    cost = measured(n2=1.0, n4=2.0, n8=2.4)
    found = [cost(n) for n in (1, 2, 3, 4, 6, 8, 10)]
    assert found == pytest.approx([1.0, 1.0, 1.5, 2.0, 2.2, 2.4, 2.6])
    assert measured(n1=2.0)(3) == pytest.approx(2.0 * 1.2)  # one size alone: the slope that was assumed
    assert measured(n1=2.0, n2=1.9)(9) >= 1.9  # more tokens never promise to take less time


def flat(size: int = 64) -> PassCost:
    return measured(n1=1.0, **{f"n{size}": 1.0})


def steep() -> PassCost:
    """Each token costs as much as a pass, as where arithmetic is the limit."""
    return measured(n1=1.0, n2=2.0, n16=16.0, n64=64.0)


def test_free_rows_are_filled_and_dear_ones_are_not():
    offers = [[0.9] * MOST]
    assert plan(offers, flat())[0] == [MOST]
    assert plan(offers, steep())[0] == [0]
    assert plan([[0.05] * MOST], flat())[0] == [0]  # hardly ever right


def test_without_offers_nothing_is_planned():
    assert plan([[], []], flat()) == ([0, 0], pytest.approx(2.0))


def test_the_answer_with_the_better_guesses_gets_the_rows():
    cost = measured(n3=1.0, n8=1.6, n64=12.8)
    good, poor, none = plan([[0.95] * 8, [0.3] * 8, []], cost)[0]
    assert good > poor and none == 0


def best_by_search(offers, cost, drafted, draft_cost) -> float:
    speeds = []
    for counts in itertools.product(*(range(len(chances) + 1) for chances in offers)):
        expected = len(offers)
        for count, chances in zip(counts, offers, strict=True):
            for place in range(count):
                chance = 1.0
                for one in chances[: place + 1]:
                    chance *= one
                expected += chance
        depth = max((counts[place] for place in drafted), default=0)
        speeds.append(expected / (cost(len(offers) + sum(counts)) + depth * draft_cost))
    return max(speeds)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.floats(0.3, 1.0), max_size=3), min_size=1, max_size=3),
    st.floats(0.0, 0.5),
)
def test_the_plan_is_as_fast_as_the_best_of_all_plans(offers, slope):
    cost = measured(**{f"n{n}": 1.0 + slope * (n - 1) for n in (1, 2, 32)})
    likely = [[c for i, c in enumerate(chances) if _reached(chances, i) >= 0.1] for chances in offers]
    best = best_by_search(likely, cost, (), 0.0)
    assert plan(offers, cost)[1] >= best / 1.021


def _reached(chances, place) -> float:
    chance = 1.0
    for one in chances[: place + 1]:
        chance *= one
    return chance


def test_a_dear_draft_is_not_used_and_a_cheap_one_is_not_deeper_than_it_pays():
    assert plan([[0.8] * MOST], flat(), drafted=[0], draft_cost=1.0)[0] == [0]
    assert plan([[0.8] * MOST], flat(), drafted=[0], draft_cost=0.001)[0] == [10]  # 0.8 ** 11 < 0.1
    assert 1 <= plan([[0.8] * MOST], flat(), drafted=[0], draft_cost=0.2)[0][0] <= 5


def test_the_first_passes_grow_step_by_step():
    cost = PassCost()
    sizes = []
    for _ in range(40):
        tokens = 1 + plan([[0.99] * MOST], cost)[0][0]
        sizes.append(tokens)
        cost.add(tokens, 1.0)
    assert sizes[-1] == 1 + MOST
    assert all(later <= 2 * max(sizes[: i + 1]) for i, later in enumerate(sizes[1:]))


def test_where_passes_are_dear_few_are_spent_to_learn_it():
    cost, spent = PassCost(), 0.0
    for step in range(200):
        tokens = 1 + plan([[0.6] * MOST], cost, idle=step % 65)[0][0]
        cost.add(tokens, float(tokens))
        spent += tokens
    assert spent / 200 < 1.05


def test_a_likely_guess_is_tried_again_after_a_while():
    assert plan([[0.9] * 4], steep(), idle=63)[0] == [0]
    assert plan([[0.9] * 4], steep(), idle=64)[0] == [1]
    assert plan([[0.4] * 4], steep(), idle=1000)[0] == [0]
