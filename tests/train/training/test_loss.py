"""Packed training has the gradient of one record at a time, whatever is packed with what."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from tests.support.models import random_model, tiny_config
from train.bench import all_logits_loss
from train.data.collate import IGNORED, label_count, packed_batch
from train.data.padded import padded_batch
from train.training import packed_attention as attention
from train.training.loss import response_loss

Example = tuple[list[int], int]


@pytest.fixture(scope="module")
def examples(records, tokenizer) -> list[Example]:
    return [tokenizer.encode_example(r["instruction"], r["context"], r["response"]) for r in records[:12]]


def model_in(dtype: torch.dtype, implementation: str, **changes) -> GPTNeoXForCausalLM:
    torch.manual_seed(3)
    config = tiny_config(initializer_range=0.05, **changes)
    config._attn_implementation = implementation
    return GPTNeoXForCausalLM(config).to(dtype)


def without_labels(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def gradient(
    model: GPTNeoXForCausalLM, batches: list[dict], total: int, loss_of=response_loss
) -> tuple[float, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for batch in batches:
        part = loss_of(model, without_labels(batch), batch["labels"], total)
        part.backward()
        loss += part.item()
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def reference_gradient(model: GPTNeoXForCausalLM, examples: list[Example]) -> tuple[float, torch.Tensor]:
    """transformers' own loss, one record at a time, weighted by its labels."""
    model.zero_grad(set_to_none=True)
    total, loss = label_count(examples), 0.0
    for ids, prompt in examples:
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens, use_cache=False).logits[0, prompt - 1 : -1]
        part = torch.nn.functional.cross_entropy(logits, tokens[0, prompt:], reduction="sum") / total
        part.backward()
        loss += part.item()
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_packed_padded_and_single_records_have_one_gradient(examples, dtype, bound):
    plain = model_in(dtype, "sdpa")
    packed = model_in(dtype, attention.NAME)
    total = label_count(examples)
    loss, expected = reference_gradient(plain, examples)
    variants = {
        "all in one pass": (packed, [packed_batch(examples, 0)]),
        "two passes": (packed, [packed_batch(examples[:5], 0), packed_batch(examples[5:], 0)]),
        "one record a pass": (packed, [packed_batch([example], 0) for example in examples]),
        "another order": (packed, [packed_batch(examples[::-1], 0)]),
        "with an empty pass": (packed, [packed_batch(examples, 0), packed_batch([], 0)]),
        "padded": (plain, [padded_batch(examples, 0)]),
        "padded in two": (plain, [padded_batch(examples[:7], 0), padded_batch(examples[7:], 0)]),
    }
    for name, (model, batches) in variants.items():
        losses = (response_loss, all_logits_loss) if name.startswith("padded") else (response_loss,)
        for loss_of in losses:
            found_loss, found = gradient(model, batches, total, loss_of)
            assert found_loss == pytest.approx(loss, rel=1e-5), name
            assert error(found, expected) < bound, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_activations_change_nothing(examples, checkpointing):
    model = model_in(torch.float32, attention.NAME)
    _, expected = gradient(model, [packed_batch(examples, 0)], 100)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    _, found = gradient(model, [packed_batch(examples, 0)], 100)
    assert error(found, expected) < 1e-6


def test_a_record_does_not_see_its_neighbours(examples):
    model = model_in(torch.float64, attention.NAME).eval()
    batch = packed_batch(examples[:3], 0)
    changed = copy.deepcopy(examples[:3])
    changed[1][0][5:9] = [7, 8, 9, 10]
    with torch.no_grad():
        inputs = [without_labels(each) for each in (batch, packed_batch(changed, 0))]
        before, after = (model.gpt_neox(**one).last_hidden_state[0] for one in inputs)
    ends = list(itertools.accumulate(len(ids) for ids, _ in examples[:3]))
    assert torch.equal(before[: ends[0]], after[: ends[0]]) and torch.equal(before[ends[1] :], after[ends[1] :])
    assert not torch.equal(before[ends[0] : ends[1]], after[ends[0] : ends[1]])


def test_labels_are_the_tokens_behind_the_prompt(examples):
    batch = packed_batch(examples, 0)
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    assert int((labels != IGNORED).sum()) == label_count(examples)
    places = torch.arange(len(ids))[labels != IGNORED]
    assert torch.equal(labels[places], ids[places + 1])
    assert int((padded_batch(examples, 0)["labels"] != IGNORED).sum()) == label_count(examples)


def test_logits_exist_only_where_there_is_a_label(examples, monkeypatch):
    model = random_model()
    model.config._attn_implementation = attention.NAME
    rows = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: rows.append(hidden.shape[0]) or head(hidden))
    batch = packed_batch(examples, 0)
    response_loss(model, without_labels(batch), batch["labels"], 1)
    assert rows == [label_count(examples)]


def test_a_pass_without_records_has_no_loss_and_zero_gradients():
    model = model_in(torch.float32, attention.NAME)
    loss, found = gradient(model, [packed_batch([], 0)], 10)
    assert loss == 0.0 and not found.any()


def test_forgetting_the_packed_inputs_is_caught(examples):
    model = model_in(torch.float32, attention.NAME)
    with pytest.raises(AssertionError, match="packed_inputs"):
        model(input_ids=torch.tensor([examples[0][0]]), use_cache=False)
