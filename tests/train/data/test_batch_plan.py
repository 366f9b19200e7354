"""The batch plan: whole records, every one once an epoch, evenly spread, and the same wherever it is made."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from modelscope_dolly.errors import SettingError
from modelscope_dolly.prompt import CONTROL_KEYS, render_example
from tests.support.paths import SHARED_DATA, needs_shared_data
from train.data.batch_plan import balance, global_batches, packed_plan
from train.data.padded import MULTIPLE, padded_plan

lengths_of = st.lists(st.integers(1, 300), min_size=1, max_size=150)


def records_of(step) -> list[int]:
    return [record for rank in step for records in rank for record in records]


def test_too_many_records_over_all_epochs_are_refused_at_once():
    with pytest.raises(SettingError, match=r"epochs is 101: with 100,000 records it must be at most 100"):
        packed_plan([5] * 100_000, 1, 101, 48, 1, 100)


@settings(deadline=None, max_examples=60)
@given(lengths_of, st.integers(0, 5), st.integers(1, 3), st.integers(8, 48), st.sampled_from([1, 2, 3, 8]))
def test_every_record_once_an_epoch_in_steps_of_the_global_batch(lengths, seed, epochs, size, world):
    plan = packed_plan(lengths, seed, epochs, size, world, tokens_per_batch=300)
    batches = global_batches(lengths, seed, epochs, size, world)
    assert len(plan.steps) == len(batches) == epochs * -(-len(lengths) // size)
    for step, batch in zip(plan.steps, batches, strict=True):
        assert sorted(records_of(step)) == sorted(batch)
        assert len(step) == world and {len(rank) for rank in step} == {plan.accumulation}
    assert Counter(record for step in plan.steps for record in records_of(step)) == Counter(
        {record: epochs for record in range(len(lengths))}
    )


@settings(deadline=None, max_examples=60)
@given(lengths_of, st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_no_pass_is_over_the_budget_and_fewer_would_not_do(lengths, seed, world):
    plan = packed_plan(lengths, seed, 1, 16, world, tokens_per_batch=300)
    loads = [sum(lengths[r] for r in records) or 1 for step in plan.steps for rank in step for records in rank]
    assert max(loads) == plan.largest.tokens <= 300
    assert plan.processed == sum(loads) and plan.tokens == sum(lengths)
    if plan.accumulation > 1:  # one pass less would overflow in at least one step
        fewer = world * (plan.accumulation - 1)
        batches = global_batches(lengths, seed, 1, 16, world)
        assert any(sum(lengths[r] for r in part) > 300 for batch in batches for part in balance(batch, lengths, fewer))


@settings(deadline=None, max_examples=60)
@given(lengths_of, st.integers(1, 12))
def test_balancing_is_within_the_bound_of_longest_first(lengths, parts):
    passes = balance(list(range(len(lengths))), lengths, parts)
    loads = [sum(lengths[record] for record in records) for records in passes]
    assert sorted(record for records in passes for record in records) == list(range(len(lengths)))
    assert loads == sorted(loads, reverse=True)
    # The fullest pass exceeds the emptiest by at most its own shortest (last placed) record.
    assert loads[0] - loads[-1] <= max((min(lengths[r] for r in records) for records in passes if records), default=0)


def test_the_records_of_a_step_do_not_depend_on_ranks_or_budget():
    lengths = [random.Random(1).randint(5, 200) for _ in range(500)]
    plans = [packed_plan(lengths, 42, 2, 48, world, budget) for world in (1, 2, 8) for budget in (400, 2048)]
    plans.append(padded_plan(lengths, 42, 2, 48, 8, 6))
    contents = [[sorted(records_of(step)) for step in plan.steps] for plan in plans]
    assert all(content == contents[0] for content in contents)


def test_hash_is_the_same_again_and_differs_with_seed_and_lengths():
    lengths = [random.Random(1).randint(5, 200) for _ in range(100)]
    one = packed_plan(lengths, 42, 1, 16, 2, 512)
    assert packed_plan(list(lengths), 42, 1, 16, 2, 512).hash == one.hash
    others = [packed_plan(lengths, 43, 1, 16, 2, 512), packed_plan([*lengths[:-1], 3], 42, 1, 16, 2, 512)]
    assert all(other.hash != one.hash for other in others)


def test_epochs_have_different_orders():
    first, second = global_batches([1] * 100, 7, 2, 100, 1)
    assert first != second and sorted(first) == sorted(second)


@settings(deadline=None, max_examples=40)
@given(lengths_of, st.sampled_from([(1, 6), (2, 4), (8, 1)]))
def test_padded_plan_counts_every_row_as_long_as_the_longest(lengths, shape):
    world, rows = shape
    plan = padded_plan(lengths, 1, 1, 48, world, rows)
    processed = 0
    for step in plan.steps:
        for rank in step:
            for records in rank:
                longest = max((lengths[record] for record in records), default=0)
                processed += len(records) * -(-longest // MULTIPLE) * MULTIPLE if records else 1
                assert len(records) <= rows
    assert plan.processed == processed >= plan.tokens


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: packed_plan([], 1, 1, 48, 1, 100), "no record"),
        (lambda: packed_plan([5, 101], 1, 1, 48, 1, 100), "record 1 has 101 tokens, more than tokens_per_batch 100"),
        (lambda: packed_plan([5], 1, 1, 4, 8, 100), "global_batch_size is 4, it must be at least"),
        (lambda: padded_plan([5], 1, 1, 48, 5, 6), "multiple of 5 ranks x padded batches of 6 = 30"),
    ],
)
def test_impossible_plans_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()


@needs_shared_data
def test_dolly_15k_takes_the_steps_of_the_public_recipe_with_two_fifths_of_its_tokens():
    tokenizer = Tokenizer.from_file(str(SHARED_DATA / "gpt-neox-20b-tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(key, special=True, normalized=False) for key in CONTROL_KEYS])
    rows = [json.loads(line) for line in (SHARED_DATA / "databricks-dolly-15k.jsonl").read_text().splitlines()]
    texts = [render_example(row["instruction"], row["context"], row["response"]) for row in rows]
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    kept = [length for length in lengths if length < 2048]
    assert len(kept) == 14_977
    train = kept[200:]
    ours, theirs = packed_plan(train, 42, 2, 48, 8, 2048), padded_plan(train, 42, 2, 48, 8, 6)
    assert len(ours.steps) == len(theirs.steps) == 616
    assert ours.processed == ours.tokens == theirs.tokens
    assert 2.3 < theirs.processed / ours.processed < 2.6
    assert 4.5 < theirs.waited / ours.waited < 5.3
    assert ours.accumulation == 1 and ours.largest.tokens < 2048
