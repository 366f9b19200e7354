"""Scoring a document as a tree of tokens gives what scoring each request on its own gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXForCausalLM

from modelscope_dolly.evaluation.shared_prefix import MODEL_TYPES, Scorer, build_tree
from tests.support.models import tiny_config

VOCABULARY = 97


def neox(**changes) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(tiny_config(vocab_size=VOCABULARY, **changes)).eval()


def gptj() -> GPTJForCausalLM:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=VOCABULARY, n_positions=256, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTJForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)  # GPTNeoX's head has none
    return model


def documents(count: int = 12, seed: int = 0) -> list[list[tuple[list[int], list[int]]]]:
    """Choices behind one context, contexts that differ in their middle, single tokens, and equal requests."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high))]

    found = []
    for number in range(count):
        context, ending = tokens(1, 30), tokens(1, 9)
        if number % 4 == 0:
            found.append([(context, tokens(1, 9)) for _ in range(4)])
        elif number % 4 == 1:
            found.append([(context + tokens(1, 3), ending) for _ in range(2)])
        elif number % 4 == 2:
            found.append([(context, [draw.randrange(VOCABULARY)]) for _ in range(2)])
        else:
            found.append([(context, ending), (context, [*ending, 5]), (context, ending), (context, ending[:1])])
    return found


@torch.inference_mode()
def directly(model, context: list[int], continuation: list[int], window: int) -> tuple[float, bool]:
    """One sequence, no padding, no sharing: the definition."""
    ids = (context + continuation)[-(window + 1) :]
    logits = model(torch.tensor([ids[:-1]])).logits[0, -len(continuation) :]
    target = torch.tensor(continuation)
    chosen = torch.log_softmax(logits.double(), -1).gather(1, target[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("model", [neox(), neox(attn_implementation="eager"), gptj()], ids=["neox", "eager", "gptj"])
@pytest.mark.parametrize("rows", [1, 5, None])
def test_scores_equal_the_definition(model, rows):
    asked = documents()
    scorer = Scorer(model, 256, rows)
    for requests, scores in zip(asked, scorer.score(asked), strict=True):
        for (context, continuation), (value, greedy) in zip(requests, scores, strict=True):
            expected, best = directly(model, context, continuation, 256)
            assert value == pytest.approx(expected, abs=1e-4)
            assert greedy == best


def test_what_greedy_decoding_says_is_known_as_greedy():
    model = neox()
    context = [3, 14, 15]
    with torch.inference_mode():
        first = int(model(torch.tensor([context])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[*context, first]])).logits[0, -1].argmax())
    [[said, other]] = Scorer(model, 256).score([[(context, [first, second]), (context, [first, (second + 1) % 97])]])
    assert said[1] and not other[1]


def test_too_long_requests_lose_tokens_on_their_left():
    model = neox()
    context, continuation = [n % 97 for n in range(40)], [1, 2, 3]
    [[(value, _), (short, _)]] = Scorer(model, 16).score([[(context, continuation), ([7], [8])]])
    assert value == pytest.approx(directly(model, context, continuation, 16)[0], abs=1e-4)
    assert abs(value - directly(model, context, continuation, 256)[0]) > 1e-2
    assert short == pytest.approx(directly(model, [7], [8], 16)[0], abs=1e-4)


def test_a_prefix_is_one_node_and_the_last_token_is_none():
    tree = build_tree([(0, ([1, 2], [3, 4])), (1, ([1, 2], [3, 5])), (2, ([1, 9], [3, 4]))], window=100)
    assert tree.tokens == [1, 2, 3, 9, 3]
    assert tree.parents == [-1, 0, 1, 0, 3]
    assert tree.depths == [0, 1, 2, 1, 2]
    assert sorted(tree.edges) == [(1, 3, 0), (1, 3, 1), (2, 4, 0), (2, 5, 1), (3, 3, 2), (4, 4, 2)]
    assert not tree.is_chain
    assert np.flatnonzero(tree.ancestors()[4]).tolist() == [0, 3, 4]
    assert build_tree([(0, ([1, 2], [3])), (1, ([1, 2], [4]))], window=100).is_chain


def test_work_counts_requests_shared_tokens_and_padding():
    asked = [[([1, 2, 3], [4, 5]), ([1, 2, 3], [6, 7])], [([1], [2])]]
    scorer = Scorer(neox(), 256, rows=2)
    scorer.score(asked)
    # 4 + 4 + 1 tokens asked; the trees have 5 nodes and 1; the second row is padded to 5.
    assert (scorer.counts.asked, scorer.counts.useful, scorer.counts.computed) == (9, 6, 10)
    assert scorer.counts.speed(2.0) == {
        "seconds": 2.0, "requests": 3, "tokens_asked": 9, "tokens_computed": 10, "tokens_per_s": 4.5,
        "padding_share": pytest.approx(0.4),
    }  # fmt: skip


def test_all_requests_are_reported_as_done():
    done = []
    asked = documents()
    Scorer(neox(), 256, rows=3).score(asked, done.append)
    assert sum(done) == sum(map(len, asked)) and len(done) == 4


def test_half_precision_sums_are_rounded_once():
    model = neox().to(torch.bfloat16)
    asked = documents(8)
    [[(coarse, _), *_], *_] = Scorer(model, 256, softmax_dtype=None).score(asked)
    [[(fine, _), *_], *_] = Scorer(model, 256).score(asked)
    assert torch.tensor(coarse).to(torch.bfloat16).item() == coarse
    assert coarse == pytest.approx(fine, rel=0.02)
    assert torch.tensor(fine).to(torch.bfloat16).item() != fine


def test_other_architectures_are_refused():
    model = neox()
    model.config.model_type = "bloom"
    with pytest.raises(ValueError, match="bloom"):
        Scorer(model, 256)
    assert MODEL_TYPES == ("gpt_neox", "gptj")
