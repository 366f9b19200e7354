"""Penalties, biases and tokens ruled out: transformers' logits processors by name, OpenAI's formulas where the names
are theirs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.logits_processors import LogitsProcessors
from modelscope_dolly.engine.logprobs import likeliest, token_logprob
from modelscope_dolly.engine.sampling import Sampler, Sampling, distribution
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from modelscope_dolly.errors import SettingError
from tests.support.models import our_engine

VOCABULARY = 60
STOP = frozenset({3, 50})


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.fixture(scope="module")
def engine(oracle) -> Engine:
    return our_engine(oracle)


def test_penalty_bad_words_and_least_length_are_those_of_transformers_in_its_order():
    rng = random.Random(0)
    for seed in range(60):
        prompt = [rng.randrange(VOCABULARY) for _ in range(20)]
        words = [tuple(rng.randrange(4, 12) for _ in range(rng.choice((1, 2, 2, 3)))) for _ in range(12)]
        bias = {rng.randrange(VOCABULARY): rng.uniform(-100, 100) for _ in range(5)}
        sampling = Sampling(
            repetition_penalty=1.4, bad_words=tuple(words), min_new_tokens=6, logit_bias=bias, do_sample=False
        )
        theirs = LogitsProcessorList(
            [
                SequenceBiasLogitsProcessor({(id,): value for id, value in bias.items()}),
                RepetitionPenaltyLogitsProcessor(1.4),
                NoBadWordsLogitsProcessor([list(word) for word in words]),
                MinNewTokensLengthLogitsProcessor(len(prompt), 6, sorted(STOP)),
            ]
        )
        processors, ids = LogitsProcessors(sampling, prompt, STOP), list(prompt)
        for row in rows(12, seed):
            before = row.clone()
            expected = theirs(torch.tensor([ids]), row[None].clone())[0]
            torch.testing.assert_close(processors.apply(row), expected, rtol=0, atol=1e-5)
            assert torch.equal(row, before)
            ids.append(rng.randrange(4, 12))  # often the beginning of a bad word
            processors.advance(ids[-1])


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-2.0, 2.0), (0.3, -1.1)])
def test_presence_and_frequency_penalties_are_those_of_openai(presence, frequency):
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c counts the sampled text alone."""
    processors = LogitsProcessors(Sampling(presence_penalty=presence, frequency_penalty=frequency), prompt=[1, 2, 2])
    sampled: list[int] = []
    for row, token in zip(rows(30, 1), [5, 5, 2, 9, 5] * 6, strict=True):
        expected = [
            float(mu) - sampled.count(j) * frequency - float(sampled.count(j) > 0) * presence
            for j, mu in enumerate(row)
        ]
        torch.testing.assert_close(processors.apply(row), torch.tensor(expected), rtol=0, atol=1e-5)
        sampled.append(token)
        processors.advance(token)


def test_min_p_is_that_of_transformers():
    rng = random.Random(3)
    dropped = 0
    for seed in range(200):
        logits = rows(1, seed)[0]
        sampling = Sampling(
            min_p=rng.choice((0.01, 0.1, 0.5, 1.0)), temperature=rng.choice((0.5, 1.0, 2.0)),
            top_k=rng.choice((0, 5)), top_p=rng.choice((1.0, 0.9)),
        )  # fmt: skip
        scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
        if sampling.top_k:
            scores = TopKLogitsWarper(sampling.top_k)(None, scores)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(None, scores)
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)[0]
        ids, probabilities = distribution(logits, sampling)
        assert set(ids.tolist()) == set(scores.isfinite().nonzero()[:, 0].tolist()), seed
        found = torch.zeros_like(logits).index_copy(0, ids, probabilities / probabilities.sum())
        torch.testing.assert_close(found, scores.softmax(0), rtol=1e-4, atol=1e-7)
        dropped += len(ids) < len(distribution(logits, replace(sampling, min_p=0.0))[0])
    assert dropped > 100


def test_log_probabilities_are_the_networks_own_and_ties_go_to_the_smaller_id():
    logits = torch.tensor([1.0, 3.0, 3.0, 0.5, 3.0])
    found = token_logprob(logits, 3, 2)
    expected = logits.log_softmax(0)
    assert [id for id, _ in found.top] == [1, 2]
    assert found.logprob == pytest.approx(float(expected[3])) and found.top[0][1] == pytest.approx(float(expected[1]))
    sampler = Sampler(Sampling(temperature=0.1, top_k=1, logit_bias={0: 50.0}, logprobs=0), [])
    assert sampler.sample(logits) == 0
    assert sampler.logprob.logprob == pytest.approx(float(expected[0])) and sampler.logprob.top == ()


def test_tokens_that_are_ruled_out_are_not_sorted_with_the_others():
    values = torch.full((500,), -torch.inf)
    values[[7, 3]] = torch.tensor([1.0, 2.0])
    assert likeliest(values, 50).tolist() == [3, 7]
    for sampling in (Sampling(), Sampling(top_k=5), Sampling(top_p=1.0), Sampling(top_p=0.9999999)):
        drawn = {Sampler(replace(sampling, seed=seed), []).sample(values) for seed in range(40)}
        assert drawn == {3, 7}


ALL = Sampling(
    temperature=1.3, min_p=0.02, presence_penalty=0.8, frequency_penalty=0.4, logit_bias={5: 3.0, 9: -100},
    bad_words=((11,), (5, 6), (5, 5)), min_new_tokens=12, repetition_penalty=1.1, logprobs=3, top_p=0.98,
)  # fmt: skip


def test_answers_and_log_probabilities_depend_on_nothing_else(engine):
    """Slots, chunked prefill, and draft tokens."""

    def asked(proposer) -> list[Request]:
        return [
            Request([1 + n, 2, 3, 1 + n, 2] * (3 + 90 * (n % 2)), 15 + n, replace(ALL, seed=n),
                    frozenset(range(0, 1024, 9)), proposer=proposer)
            for n in range(6)
        ]  # fmt: skip

    alone = [list(engine.run([one])) for one in asked(None)]
    for slots, proposer in ((3, None), (6, PromptLookup)):
        found: list[list] = [[] for _ in alone]
        for token in engine.run(asked(proposer), slots):
            found[token.index].append(token)
        for tokens, expected in zip(found, alone, strict=True):
            assert [token.id for token in tokens] == [token.id for token in expected]
            for token, other in zip(tokens, expected, strict=True):
                assert token.logprob.id == token.id and len(token.logprob.top) == 3
                assert token.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
    for tokens in alone:
        ids = [token.id for token in tokens]
        assert len(ids) >= 13 and 11 not in ids and not any(pair in ((5, 6), (5, 5)) for pair in zip(ids, ids[1:]))  # noqa: B905, RUF007


def test_log_probabilities_are_those_of_transformers(oracle, engine):
    request = Request([5, 6, 7, 8] * 9, 12, Sampling(seed=2, logprobs=4))
    tokens = list(engine.run([request]))
    ids = torch.tensor([[*request.ids, *(token.id for token in tokens)]])
    with torch.inference_mode():
        expected = oracle(ids).logits[0, len(request.ids) - 1 : -1].log_softmax(-1)
    for token, row in zip(tokens, expected, strict=True):
        values, best = row.topk(4)
        assert token.logprob.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [id for id, _ in token.logprob.top] == best.tolist()
        assert [value for _, value in token.logprob.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_token_that_is_not_there_or_none_left_is_an_error_before_anything_runs(engine):
    with pytest.raises(SettingError, match="logit_bias: there is no token 1024; ids are 0 to 1023"):
        engine.submit([Request([1], 1, Sampling(logit_bias={1024: 1.0}))])
    everything = tuple((id,) for id in range(1, 1024))
    with pytest.raises(SettingError, match="bad_words: they may rule out all 1024 tokens"):
        engine.submit([Request([1], 1, Sampling(bad_words=everything), frozenset({0}))])
