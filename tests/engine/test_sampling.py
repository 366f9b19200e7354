"""Sampling against transformers' own logits processors, which are the definition of the keywords."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modelscope_dolly.engine.logits_processors import penalize
from modelscope_dolly.engine.sampling import Sampler, Sampling, _mix, distribution, noise
from modelscope_dolly.engine.sampling import draw as draw_rows


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[V] scores after the warpers that transformers' generate would use: -inf for what they drop."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores[0]


def ours(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[V] probabilities of `distribution`, renormalised; 0 for what is not kept."""
    ids, probabilities = distribution(logits, sampling)
    assert len(set(ids.tolist())) == len(ids)
    if sampling.top_k or sampling.top_p < 1.0:
        assert bool((probabilities.diff() <= 0).all())  # likeliest first
    else:
        assert ids.tolist() == list(range(len(logits)))
    return torch.zeros_like(logits).index_copy(0, ids, probabilities / probabilities.sum())


def on_the_border(logits: torch.Tensor, sampling: Sampling) -> bool:
    """Whether rounding decides which token is the last one within top_p."""
    if sampling.top_p == 1.0:
        return False
    values = (logits.double() / sampling.temperature).sort(descending=True).values[: sampling.top_k or None]
    return bool(((values.softmax(0).cumsum(0) - sampling.top_p).abs() < 1e-6).any())


def test_the_kept_tokens_and_their_probabilities_are_those_of_transformers():
    rng = random.Random(0)
    compared = filtered = 0
    for seed in range(500):
        vocabulary = rng.choice((1, 2, 7, 50, 400, 6000))
        logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * rng.choice((0.1, 1, 5, 30))
        sampling = Sampling(
            temperature=rng.choice((0.05, 0.7, 1.0, 2.5)),
            top_k=rng.choice((0, 0, 1, 3, 40, 1000)),
            top_p=rng.choice((1.0, 0.92, rng.uniform(0.01, 0.999))),
        )
        if on_the_border(logits, sampling):
            continue
        expected = warped(logits, sampling)
        kept = set(distribution(logits, sampling)[0].tolist())
        assert kept == set(expected.isfinite().nonzero()[:, 0].tolist()), (seed, sampling)
        torch.testing.assert_close(ours(logits, sampling), expected.softmax(0), rtol=1e-4, atol=1e-7)
        compared += 1
        filtered += len(kept) < vocabulary
    assert compared > 450 and filtered > 200, (compared, filtered)


def test_equally_likely_tokens_are_kept_in_the_order_of_their_ids():
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 2.0])
    for kept in range(1, 5):
        assert distribution(logits, Sampling(top_k=kept, top_p=1.0))[0].tolist() == [1, 2, 4, 5][:kept]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-40, 1e-300])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature):
    logits = torch.tensor([10.0, -300.0, 40.0, 30.0])
    drawn = {Sampler(Sampling(temperature=temperature, seed=seed), []).sample(logits) for seed in range(50)}
    assert drawn == {2}


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 8.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(60, generator=generator) * 4
        before = logits.clone()
        seen = torch.randint(0, 60, (25,), generator=generator).tolist()
        torch.testing.assert_close(
            penalize(logits, set(seen), penalty), processor(torch.tensor([seen]), logits[None])[0], rtol=0, atol=0
        )
        assert torch.equal(logits, before)


def test_repetition_penalty_counts_the_prompt_and_what_was_drawn():
    logits = torch.tensor([3.0, 2.9, 2.8, -1.0])
    sampler = Sampler(Sampling(do_sample=False, repetition_penalty=2.0), prompt=[0])
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]
    assert Sampler(Sampling(do_sample=False), prompt=[0]).sample(logits) == 0


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=1.0, seed=3),
        Sampling(top_p=0.8, seed=4),
        Sampling(top_k=4, top_p=0.9, temperature=1.7, seed=5),
        Sampling(top_p=1.0, temperature=0.5, seed=6),
    ],
)
def test_draws_follow_the_distribution(sampling):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    expected = warped(logits, sampling).softmax(0)
    sampler, draws = Sampler(sampling, []), 10_000
    counts = torch.zeros(12)
    for _ in range(draws):
        counts[sampler.sample(logits)] += 1
    assert int(counts.sum()) == draws
    assert not counts[expected == 0].any()
    assert (counts / draws - expected).abs().sum() / 2 < 0.017  # total variation; chance gives about 0.009
    # Pearson's chi-square: its mean is the degrees of freedom, its variance twice that.
    kept = expected > 0
    chi_square = ((counts - draws * expected)[kept].square() / (draws * expected[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def draw(sampling: Sampling, count: int = 40) -> list[int]:
    generator = torch.Generator().manual_seed(9)
    sampler = Sampler(sampling, [])
    return [sampler.sample(torch.randn(100, generator=generator)) for _ in range(count)]


def test_a_seed_gives_its_draws_whatever_else_is_drawn():
    first = draw(Sampling(seed=7))
    torch.manual_seed(123)
    torch.rand(10)
    assert draw(Sampling(seed=7)) == first
    assert all(draw(Sampling(seed=seed)) != first for seed in range(7))

    logits = torch.randn(100, generator=torch.Generator().manual_seed(2))
    alone = [sampler.sample(logits) for sampler in [Sampler(Sampling(seed=1), [])] for _ in range(20)]
    mixed, other = Sampler(Sampling(seed=1), []), Sampler(Sampling(seed=2), [])
    assert [(mixed.sample(logits), other.sample(logits))[0] for _ in range(20)] == alone


def test_draws_are_numbered_whatever_is_kept():
    narrow, wide = Sampler(Sampling(top_k=1, seed=3), []), Sampler(Sampling(top_p=1.0, seed=3), [])
    peaked, logits = torch.zeros(100), torch.randn(100, generator=torch.Generator().manual_seed(2))
    for _ in range(5):
        narrow.sample(peaked)
        wide.sample(logits)
    flat = torch.zeros(50)
    narrow.sampling = wide.sampling
    assert [narrow.sample(flat) for _ in range(30)] == [wide.sample(flat) for _ in range(30)]


@pytest.mark.parametrize("sampling", [Sampling(seed=5), Sampling(seed=5, repetition_penalty=1.5, top_k=30)])
def test_a_copy_draws_what_the_original_will_draw_and_leaves_it_alone(sampling):
    rows = list(torch.randn(40, 200, generator=torch.Generator().manual_seed(1)) * 2)
    sampler, alone = Sampler(sampling, [1, 2]), Sampler(sampling, [1, 2])
    for row in rows[:10]:
        assert sampler.sample(row) == alone.sample(row)
    twin = sampler.copy()
    drawn = [twin.sample(row) for row in rows[10:]]
    assert [sampler.sample(row) for row in rows[10:]] == drawn == [alone.sample(row) for row in rows[10:]]


def test_rounding_hardly_ever_changes_a_draw():
    """Noise belongs to the token id: logits in bfloat16 mostly give the tokens of float32."""
    same = total = 0
    for seed in range(20):
        logits = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * 3
        exact, rounded = (Sampler(Sampling(seed=seed), []) for _ in range(2))
        for _ in range(25):
            same += exact.sample(logits) == rounded.sample(logits.bfloat16())
            total += 1
    assert same > 0.97 * total


def test_noise_is_exponential_and_differs_between_draws_ids_and_seeds():
    ids = torch.arange(50_000)
    first, second = noise(1, ids), noise(2, ids)
    for found in (first, second):
        assert abs(float(found.mean()) - 1) < 0.02 and abs(float(found.var()) - 1) < 0.05 and float(found.min()) > 0
        assert abs(float((found < 0.1).double().mean()) - 0.0952) < 0.005
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack((first[1:], first[:-1])))[0, 1])) < 0.02
    assert torch.equal(noise(1, ids[[7, 49_999]]), first[[7, 49_999]])
    # SplitMix64 from state 0: its published first outputs
    assert [_mix(0), _mix(0x9E3779B97F4A7C15)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    uniform = torch.exp(-noise(0, torch.tensor([1, 2])))
    assert uniform.tolist() == pytest.approx([0xE220A8397B1DCDAF / 2**64, 0x6E789E6AA1B965F4 / 2**64], abs=1e-15)


def test_seeds_may_be_as_large_as_the_settings_allow():
    assert len({tuple(draw(Sampling(seed=seed), 10)) for seed in (0, 1, 2**31, 2**32 - 1)}) == 4


def test_greedy_takes_the_likeliest_whatever_temperature_and_filters_say():
    for seed in range(50):
        logits = torch.randn(80, generator=torch.Generator().manual_seed(seed))
        for changes in ({}, {"temperature": 50.0}, {"top_p": 0.01}, {"top_k": 1}, {"seed": seed}):
            assert Sampler(Sampling(do_sample=False, **changes), []).sample(logits) == int(logits.argmax())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_sampled_in_float32(dtype):
    logits = torch.randn(200, generator=torch.Generator().manual_seed(4)).to(dtype)
    for sampling in (Sampling(seed=5), Sampling(do_sample=False), Sampling(seed=5, repetition_penalty=1.7)):
        half, full = Sampler(sampling, [1, 2, 3]), Sampler(sampling, [1, 2, 3])
        assert [half.sample(logits) for _ in range(25)] == [full.sample(logits.float()) for _ in range(25)]


def settings(samplers: list[Sampler]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [4, B] and float32 [3, B] of several samplers."""
    both = [one.settings() for one in samplers]
    return torch.tensor([whole for whole, _ in both]).T.contiguous(), torch.tensor([rest for _, rest in both]).T


def test_draws_for_a_batch_are_those_of_its_samplers():
    """What a GPU draws without the host, `draw`, against `Sampler.next` row by row, over several steps."""
    rng = random.Random(5)
    for seed in range(150):
        vocabulary, rows = rng.choice((1, 2, 7, 50, 400, 6000)), rng.choice((1, 3, 5))
        generator = torch.Generator().manual_seed(seed)
        samplers = [
            Sampler(
                Sampling(
                    do_sample=rng.random() < 0.8,
                    temperature=rng.choice((0.05, 0.7, 1.0, 2.5, 1e-40)),
                    top_k=rng.choice((0, 0, 1, 3, 40, 1000)),
                    top_p=rng.choice((1.0, 0.92, rng.uniform(0.01, 0.999))),
                    repetition_penalty=rng.choice((1.0, 1.0, 1.3, 0.5)),
                    seed=rng.randrange(2**32),
                ),
                prompt=[rng.randrange(vocabulary) for _ in range(3)],
            )
            for _ in range(rows)
        ]
        seen = torch.zeros(rows, vocabulary, dtype=torch.bool)
        for row, sampler in enumerate(samplers):
            seen[row, list(sampler.seen or ())] = True
        if all(sampler.seen is None for sampler in samplers):
            seen = None
        whole, others = settings(samplers)
        for _ in range(4):
            logits = torch.randn(rows, vocabulary, generator=generator) * rng.choice((0.1, 1, 5, 30))
            tokens = draw_rows(logits, whole, others, seen, sampled=True).tolist()
            assert tokens == [sampler.sample(row) for sampler, row in zip(samplers, logits, strict=True)], seed
        assert whole[1].tolist() == [sampler.draws for sampler in samplers]


def test_equal_logits_are_drawn_alike_in_a_batch():
    """Ties: whole numbers as logits, where the smaller id comes first within top_k and top_p."""
    logits = torch.randint(0, 3, (40, 300), generator=torch.Generator().manual_seed(0)).float()
    samplers = [Sampler(Sampling(top_k=30, top_p=0.8, seed=seed), []) for seed in range(40)]
    whole, others = settings(samplers)
    expected = [sampler.sample(row) for sampler, row in zip(samplers, logits, strict=True)]
    assert draw_rows(logits, whole, others, None, sampled=True).tolist() == expected
