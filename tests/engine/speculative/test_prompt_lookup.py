"""Prompt lookup against a naive search, and its measured acceptance rates."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup

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
        lookup.append(ids[end])
        length, place = lookup.match()
        assert length == naive_match(ids[: end + 1])[0]
        assert not length or place == naive_match(ids[: end + 1])[1]


@settings(deadline=None, max_examples=200)
@given(texts, st.integers(1, 70))
def test_the_draft_is_what_followed_and_then_repeats_itself(ids, most):
    draft, probabilities = PromptLookup(ids).propose(most)
    length, place = naive_match(ids)
    text = list(ids)
    for offset in range(most if length else 0):
        text.append(text[place + offset])
    assert draft == text[len(ids) :]
    assert len(probabilities) == len(draft) and all(0 <= one <= 1 for one in probabilities)


def test_a_copied_passage_is_proposed_after_its_first_token():
    passage = list(range(100, 140))
    lookup = PromptLookup([1, 2, 3, *passage, 4, 5])
    lookup.append(passage[0])
    assert lookup.propose(10)[0] == passage[1:11]
    # as the match grows longer the draft is worth more
    first = lookup.propose(1)[1][0]
    for token in passage[1:6]:
        lookup.append(token)
    assert lookup.propose(10)[0] == passage[6:16]
    assert lookup.propose(1)[1][0] > max(first, 0.7)


def test_probabilities_follow_what_came_whether_or_not_it_was_verified():
    right, wrong = PromptLookup([1, 2, 3, 4] * 3), PromptLookup([7, 8, 9, 10] * 3)
    before = right.propose(1)[1]
    assert before == wrong.propose(1)[1]
    for step in range(12):
        right.append(1 + step % 4)
        for token in (7, 8, 100 + step):  # 7 is followed by 8 as before, 8 never by what followed it
            wrong.append(token)
    wrong.append(7)
    after_seven = wrong.propose(1)[1]
    wrong.append(8)
    assert right.propose(1)[1] > before and right.propose(1)[1][0] > 0.85
    assert after_seven[0] > 0.6 and wrong.propose(1)[1][0] < 0.15


def test_no_match_makes_no_draft():
    assert PromptLookup([]).propose(5) == ([], [])
    assert PromptLookup(list(range(50))).propose(5) == ([], [])


def test_building_the_index_looks_at_each_token_a_constant_number_of_times():
    lookup = PromptLookup([5] * 4000 + list(range(4000)))
    assert len(lookup._after) <= PromptLookup.LONGEST * 8000
