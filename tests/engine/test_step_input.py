"""Where the tokens of a pass belong: positions, slots, the rectangle of a verification and its mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine.step_input import Span, StepInput

CPU = torch.device("cpu")
#: New tokens of each slot, 0: the slot is left out; and how many came before them.
SLOTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), min_size=1, max_size=6).filter(
    lambda slots: any(count for count, _ in slots)
)


def test_prompts_lie_end_to_end():
    step = StepInput.prefill([3, 1, 2], first_slot=4)
    assert step.spans == (Span(4, 0, 3), Span(5, 3, 4), Span(6, 4, 6))
    assert step.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert step.logit_rows() == [2, 3, 5]
    inputs = step.on(CPU)
    assert inputs.slots.tolist() == [4, 4, 4, 5, 6, 6] and inputs.ends.tolist() == [0, 3, 4, 6]
    assert step.on(CPU) is inputs


def test_a_decode_step_has_one_token_in_each_of_the_first_slots():
    step = StepInput.decode([7, 0, 3])
    assert (step.length, step.logit_rows()) == (8, None)
    mask = step.on(CPU).mask(torch.float32)
    assert mask.shape == (3, 1, 1, 8) and mask[:, 0, 0].isinf().sum(1).tolist() == [0, 7, 4]
    assert StepInput.decode([7]).on(CPU).mask(torch.float32) is None  # a single token sees all


@settings(deadline=None, max_examples=100)
@given(SLOTS)
def test_each_token_of_a_verification_is_at_its_place_of_the_rectangle_and_sees_what_is_before_it(slots):
    spans = [(slot, start, count) for slot, (count, start) in enumerate(slots) if count]
    step = StepInput.verify(spans)
    inputs = step.on(CPU)
    where = [(slot, start + offset) for slot, start, count in spans for offset in range(count)]
    assert list(zip(inputs.slots.tolist(), step.positions.tolist(), strict=True)) == where
    ids = torch.arange(1.0, 1 + len(where))[:, None]
    grid = inputs.grid.fill(ids)
    assert torch.equal(inputs.grid.gather(grid), ids)
    assert grid.shape[:2] == inputs.grid.shape and int((grid > 0).sum()) == len(where)
    mask = inputs.mask(torch.float32)
    for slot, start, count in spans:
        for offset in range(count):
            assert grid[slot, offset] == 1 + where.index((slot, start + offset))
            if mask is not None:
                assert int(mask[slot, 0, offset].isfinite().sum()) == start + offset + 1
    ends = [sum(count for _, _, count in spans[: i + 1]) - 1 for i in range(len(spans))]
    assert StepInput.verify(spans, last_only=True).logit_rows() == ends
