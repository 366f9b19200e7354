"""Duplicates: what is reported is one by its definition, and what is one by far is found."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from tests.support.record_files import examples
from train.data.duplicates import SIMILAR, Duplicate, find_duplicates, groups
from train.data.validate import TrainingRecord

WORDS = [f"word{number}" for number in range(400)]


def record(instruction: str, response: str, context: str = "") -> TrainingRecord:
    return TrainingRecord(instruction, context, response, 1)


def pairs(*records: TrainingRecord) -> list[tuple[int, int, bool]]:
    return [(found.first, found.later, found.exact) for found in find_duplicates(records)]


def test_equal_ones_and_those_that_differ_in_case_space_and_punctuation():
    dew = record("What is dew?", "Drops of water on cold things in the morning.")
    same = record("what is  DEW", "drops of water, on cold things -- in the morning")
    wide = record("What is dew？", "Ｄrops of water on cold things in the morning")
    assert pairs(dew, same, dew, wide) == [(0, 1, False), (0, 2, True), (0, 3, False)]


def test_the_answer_and_the_context_count():
    question = "Which of these words begin with the letter of the name that is in the text?"
    assert pairs(record(question, "Ada and Albert"), record(question, "Zoe is the one that does")) == []
    one, other = " ".join(WORDS[:80]), " ".join(WORDS[100:180])
    assert pairs(record(question, "Ada", one), record(question, "Ada", other)) == []
    assert pairs(record(question, "Ada", one), record(question, "Ada", f"{one} indeed")) == [(0, 1, False)]
    questions = [record(f"What about {word}, and why?", f"It is {word} here.", one) for word in WORDS[:20]]
    assert pairs(*questions) == []  # many questions about one passage


def test_chinese_is_compared_by_characters():
    text = "露水是清晨在冷的物体表面凝结的小水滴，太阳出来以后就会慢慢蒸发掉"
    changed = text.replace("慢慢", "")
    assert pairs(record("什么是露水？", text), record("什么是露水", changed)) == [(0, 1, False)]
    assert pairs(record("什么是露水？", text), record("什么是雨？", "雨是从云里落下来的水")) == []


def test_texts_without_a_word():
    assert pairs(record("+ - *", "/ ="), record("+ - *", "/ !="), record("?", "!"), record("?", "!")) == [(2, 3, True)]


def triples(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


@examples
@given(st.integers(0, 2**32), st.integers(0, 40))
def test_a_pair_is_reported_exactly_when_its_similarity_says_so(seed, changes):
    draw = random.Random(seed)
    words = draw.choices(WORDS, k=120)
    changed = list(words)
    for place in draw.sample(range(120), changes):
        changed[place] = draw.choice(WORDS)
    one, other = " ".join(words), " ".join(changed)
    similarity = len(triples(one) & triples(other)) / len(triples(one) | triples(other))
    found = find_duplicates([record(one, ""), record(other, "")])
    if one == other or similarity >= SIMILAR + 0.03:  # at the border a pair meets in no bucket once in 2,500 times
        assert [(it.first, it.later) for it in found] == [(0, 1)]
        assert abs(found[0].similarity - similarity) < 1e-9
    if similarity < SIMILAR:
        assert found == []


def test_many_alike_cost_no_square_and_form_one_group():
    base = " ".join(WORDS[:100])
    records = [record("Say it.", f"{base} {number}") for number in range(3000)]
    found = find_duplicates(records)
    assert len(found) == 2999 and {it.first for it in found} == {0}
    assert set(groups(3000, found)) == {0}


def test_groups_go_over_several_steps():
    assert groups(5, [Duplicate(0, 2, False, 0.9), Duplicate(2, 4, True, 1.0)]) == [0, 1, 0, 3, 0]
