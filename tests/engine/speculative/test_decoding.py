"""Speculative decoding: the tokens of plain decoding whatever is proposed, and fewer steps where it is accepted."""

from __future__ import annotations

import gc
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from weakref import WeakSet

import pytest
import torch

from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sampling import Sampling, distribution
from modelscope_dolly.engine.sequence import Request, RunStats
from modelscope_dolly.engine.speculative.decoding import SpeculativeDecoding
from modelscope_dolly.engine.speculative.draft_model import DraftModel
from modelscope_dolly.engine.speculative.policy import MAX_DRAFT_TOKENS
from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from modelscope_dolly.engine.step_timer import StepTimer
from tests.support.models import our_engine, our_network, random_model

GREEDY = Sampling(do_sample=False)


class Flat(StepTimer):
    """Steps of all sizes take the same time, so that every draft token is verified."""

    def __init__(self, seconds: float = 1.0):
        super().__init__()
        self._sizes, self._typical = [1, 10_000], {1: seconds, 10_000: seconds}

    def add(self, tokens: int, seconds: float) -> None:
        pass


class Fixed:
    """A proposer that is always sure of itself; `next_ids` maps the ids so far and a limit to draft tokens."""

    def __init__(self, prompt, next_ids):
        self.ids, self.next_ids = list(prompt), next_ids

    def append(self, token: int) -> None:
        self.ids.append(token)

    def propose(self, limit: int):
        ids = self.next_ids(self.ids, limit)
        return ids, [1.0] * len(ids)


def proposer(next_ids):
    return lambda prompt: Fixed(prompt, next_ids)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(1, 1024, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def engine(oracle) -> Engine:
    return replace(our_engine(oracle), timer=Flat())


@pytest.fixture(scope="module")
def varied() -> list[Request]:
    """Greedy and sampled requests of all kinds; the prompts repeat themselves, so that a lookup finds something."""
    rng = random.Random(4)
    requests = []
    for seed in range(24):
        passage = random_ids(rng.randint(1, 25), seed)
        sampling = GREEDY
        if seed % 3:
            sampling = Sampling(
                temperature=rng.choice((0.3, 0.7, 1.0)),
                top_k=rng.choice((0, 5)),
                top_p=rng.choice((0.5, 0.92, 1.0)),
                seed=seed,
            )
        if seed % 5 == 0:
            sampling = replace(sampling, repetition_penalty=1.2)
        stops = frozenset(range(0, 1024, 40)) if seed % 2 else frozenset()
        requests.append(Request(passage * rng.randint(1, 3), rng.randint(1, 40), sampling, stops))
    return requests


@pytest.fixture(scope="module")
def plain(oracle, varied) -> list[list]:
    """(id, finish reason) of each request's tokens, made alone and without draft tokens."""
    engine = our_engine(oracle)
    return [[(token.id, token.finish_reason) for token in engine.run([request])] for request in varied]


def tokens_of(engine: Engine, requests, slots: int, stats: RunStats | None = None) -> list[list]:
    found: list[list] = [[] for _ in requests]
    for token in engine.run(requests, slots, stats):
        found[token.index].append((token.id, token.finish_reason))
    return found


def proposing(requests, make) -> list[Request]:
    return [replace(request, proposer=make(place)) for place, request in enumerate(requests)]


def knowing(requests, plain):
    """Proposes what will come, and random ids beyond the end of the answer."""

    def make(place):
        answer = [token for token, _ in plain[place]]
        begin = len(requests[place].ids)
        return proposer(lambda ids, most: (answer[len(ids) - begin :] + [5] * most)[:most])

    return make


def often_right(requests, plain):
    def make(place):
        rng, known = random.Random(place), knowing(requests, plain)(place)

        def build(prompt):
            inner = known(prompt)

            def spoilt(ids, most):
                return [
                    token if rng.random() < 0.7 else rng.randrange(1024)
                    for token in inner.next_ids(ids, rng.randint(0, most))
                ]

            return Fixed(prompt, spoilt)

        return build

    return make


def noise(place):
    rng = random.Random(place)
    return proposer(lambda ids, most: [rng.randrange(1024) for _ in range(most)])


PROPOSERS = {
    "lookup": lambda requests, plain: lambda place: PromptLookup,
    "knowing": knowing,
    "often right": often_right,
    "random": lambda requests, plain: noise,
    "always wrong": lambda requests, plain: (
        lambda place: proposer(
            lambda ids, most: [(token + 1) % 1024 for token in knowing(requests, plain)(place)(ids).next_ids(ids, most)]
        )
    ),
    "too many": lambda requests, plain: lambda place: proposer(lambda ids, most: [1] * (most + 50)),
    "not ids": lambda requests, plain: lambda place: proposer(lambda ids, most: [3, 1024, -1, 10**9][:most]),
}


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("name", PROPOSERS)
def test_any_proposer_gives_the_tokens_of_plain_decoding(engine, varied, plain, name, slots):
    stats = RunStats()
    requests = proposing(varied, PROPOSERS[name](varied, plain))
    assert tokens_of(engine, requests, slots, stats) == plain
    assert stats.proposed > 0
    assert stats.decode_tokens == sum(map(len, plain)) - len(plain)
    if name in ("random", "always wrong", "not ids"):
        assert stats.accepted <= 0.02 * stats.proposed
    if name == "always wrong":
        assert stats.accepted == 0


def test_requests_with_and_without_proposers_share_a_batch(engine, varied, plain):
    requests = [one if place % 2 else replace(one, proposer=PromptLookup) for place, one in enumerate(varied)]
    assert tokens_of(engine, requests, slots=5) == plain


def test_accepted_draft_tokens_save_steps(engine, varied, plain):
    stats = RunStats()
    [place] = [i for i, answer in enumerate(plain) if len(answer) == max(map(len, plain))][:1]
    tokens_of(engine, proposing(varied, knowing(varied, plain))[place : place + 1], 1, stats)
    made = len(plain[place]) - 1
    assert made > 2 * MAX_DRAFT_TOKENS
    assert stats.decode_steps == -(-made // (MAX_DRAFT_TOKENS + 1))
    assert stats.accepted == made - stats.decode_steps
    assert stats.steps == stats.decode_steps + 1


def test_no_draft_reaches_beyond_the_last_token_of_an_answer(engine):
    asked: list[int] = []

    def watched(ids, most):
        asked.append(most)
        return [1] * (most + 3)

    sizes = []
    hook = engine.net.register_forward_pre_hook(lambda net, inputs: sizes.append(len(inputs[0])))
    try:
        engine.generate([Request([1, 2, 3], 6, GREEDY, proposer=proposer(watched))])
    finally:
        hook.remove()
    assert max(asked) == 4  # one is made by prefill, one by the step itself
    assert max(sizes[1:]) == 5 and sizes[-1] == 1


def test_an_answer_may_fill_the_window_with_draft_tokens(oracle, engine):
    ids = random_ids(2000, 8)
    whole = our_engine(oracle).generate([Request(ids, 48, GREEDY)])
    seen = proposer(lambda ids, most: (whole[0] + [1] * 99)[len(ids) - 2000 :][:most])
    for make in (seen, proposer(lambda ids, most: [1] * most)):
        assert engine.generate([Request(ids, 48, GREEDY, proposer=make)]) == whole


def test_on_token_sees_each_token_once_and_ends_the_answer_within_a_step(engine, varied, plain):
    place = max(range(0, len(varied), 6), key=lambda i: len(plain[i]))
    seen: list[int] = []

    def watch(token: int) -> bool:
        seen.append(token)
        return len(seen) == 7

    requests = proposing([replace(varied[place], on_token=watch)], lambda _: knowing(varied, plain)(place))
    tokens = list(engine.run(requests))
    assert [token.id for token in tokens] == seen == [token for token, _ in plain[place]][:7]
    assert [token.finish_reason for token in tokens] == [None] * 6 + ["stop"]


def test_a_reader_who_leaves_in_the_middle_of_a_step_leaves_the_engine_usable(engine, varied, plain):
    place = max(range(0, len(varied), 6), key=lambda i: len(plain[i]))
    run = engine.run(proposing([varied[place]], lambda _: knowing(varied, plain)(place)))
    for _ in range(5):
        next(run)
    run.close()
    assert next(run, None) is None
    assert tokens_of(engine, varied, 4) == plain


def test_threads_and_interleaved_runs_do_not_disturb_each_other(engine, varied, plain):
    requests = proposing(varied, lambda _: PromptLookup)
    runs = [engine.run(requests, slots) for slots in (2, 5)]
    found = [[[] for _ in varied] for _ in runs]
    going = [0, 1]
    while going:
        for name in list(going):
            token = next(runs[name], None)
            if token is None:
                going.remove(name)
            else:
                found[name][token.index].append((token.id, token.finish_reason))
    assert found == [plain, plain]


# ---- what is drawn follows the network's distribution


def test_the_distribution_under_sampling_is_that_of_the_network():
    """Pearson's chi-square over the second and third token of many seeds; some draft tokens are accepted."""
    model = random_model(seed=3, vocab_size=8, initializer_range=0.15)
    engine = replace(our_engine(model), timer=Flat())
    prompt, sampling = [1, 2, 3], Sampling(top_p=0.9)
    seeds = 3000
    requests = [
        Request(prompt, 3, replace(sampling, seed=seed), proposer=proposer(lambda ids, most: [4, 2][:most]))
        for seed in range(seeds)
    ]
    answers = engine.generate(requests, slots=100)
    counts = Counter(tuple(answer) for answer in answers)
    expected = {}
    with torch.inference_mode():
        for first, p in probabilities(model, prompt, sampling).items():
            for second, q in probabilities(model, [*prompt, first], sampling).items():
                for third, r in probabilities(model, [*prompt, first, second], sampling).items():
                    expected[first, second, third] = p * q * r
    assert sum(expected.values()) == pytest.approx(1.0)
    assert set(counts) <= set(expected)
    likely = {key: p for key, p in expected.items() if p * seeds >= 5}
    rare = 1.0 - sum(likely.values())
    chi_square = sum((counts[key] - seeds * p) ** 2 / (seeds * p) for key, p in likely.items())
    if rare * seeds >= 5:
        found = seeds - sum(counts[key] for key in likely)
        chi_square += (found - seeds * rare) ** 2 / (seeds * rare)
    freedom = len(likely) - (rare * seeds < 5)
    assert freedom > 10
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def probabilities(model, ids: list[int], sampling: Sampling) -> dict[int, float]:
    kept, weights = distribution(model(torch.tensor([ids])).logits[0, -1].float(), sampling)
    return dict(zip(kept.tolist(), (weights / weights.sum()).tolist(), strict=True))


# ---- a draft network


def with_draft(oracle, draft, timer: StepTimer | None = None) -> Engine:
    model = DraftModel(our_network(draft), timer or Flat(0.0))
    return replace(our_engine(oracle), timer=Flat(), speculation=partial(SpeculativeDecoding, draft=model))


def draft_steps(engine: Engine) -> list[int]:
    """Tokens of each step of the engine's draft network from now on."""
    steps: list[int] = []
    net = engine.speculation.keywords["draft"].net
    net.register_forward_pre_hook(lambda _, inputs: steps.append(len(inputs[0])))
    return steps


def test_the_drafts_cache_is_counted_before_admission_and_given_back_with_the_other(oracle, monkeypatch):
    """Room for four sequences is room for two where a draft of the same size has keys and values of its own."""
    engine, most = with_draft(oracle, random_model()), []
    asked = [Request(list(range(1, 60)), 60, GREEDY) for _ in range(5)]  # 128 places each
    expected = our_engine(oracle).generate(asked, 5)
    room = 4 * 128 * engine.net.cache_bytes

    def held() -> int:
        return sum(cache.slots * cache.length * size for cache, size in engine._state.runner._caches())

    def left(device) -> float:
        return (room + 64) / 0.9 - held()

    def count(net, inputs) -> None:
        most.append(len(engine._state.scheduler.running))
        assert held() <= room

    monkeypatch.setattr("modelscope_dolly.engine.runner.free_memory", left)
    engine.net.register_forward_pre_hook(count)
    assert engine.generate(asked, 5) == expected
    assert max(most) == 2 and held() == 0


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", [0, 9])
def test_any_draft_gives_the_tokens_of_plain_decoding(oracle, varied, plain, slots, seed):
    stats = RunStats()
    engine = with_draft(oracle, random_model(seed=seed))
    steps = draft_steps(engine)
    assert tokens_of(engine, varied, slots, stats) == plain
    assert stats.proposed > 0 and steps
    if seed == 0:  # the same weights: all it drafts is right, but for what lies beyond a stop id
        assert stats.accepted >= 0.8 * stats.proposed
        assert stats.decode_steps < 0.3 * stats.decode_tokens or slots > 1


def test_a_draft_with_the_same_weights_is_accepted_to_the_last_token(oracle):
    for sampling in (GREEDY, Sampling(seed=3), Sampling(seed=4, repetition_penalty=1.3, temperature=0.7)):
        stats, engine = RunStats(), with_draft(oracle, oracle)
        request = Request(random_ids(30, 1), 60, sampling)
        assert tokens_of(engine, [request], 1, stats) == tokens_of(our_engine(oracle), [request], 1)
        assert stats.accepted == stats.proposed
        assert stats.accepted + stats.decode_steps == 59


def test_a_draft_that_nearly_agrees_is_mostly_right_with_the_same_dice(oracle):
    near = random_model()
    with torch.no_grad():
        for number, parameter in enumerate(near.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.003)
    stats = RunStats()
    requests = [Request(random_ids(20, seed), 40, Sampling(seed=seed)) for seed in range(6)]
    assert tokens_of(with_draft(oracle, near), requests, 3, stats) == tokens_of(our_engine(oracle), requests, 3)
    assert stats.accepted > 0.6 * stats.proposed


def test_lookup_and_draft_work_together(oracle, varied, plain):
    engine = with_draft(oracle, random_model(seed=9))
    assert tokens_of(engine, proposing(varied, lambda _: PromptLookup), 4) == plain
    assert tokens_of(engine, proposing(varied, knowing(varied, plain)), 4) == plain


def test_a_draft_that_is_wrong_is_asked_less_and_less(oracle):
    engine = with_draft(oracle, random_model(seed=9), timer=Flat(0.2))
    stats, steps = RunStats(), draft_steps(engine)
    tokens_of(engine, [Request(random_ids(30, 1), 400, GREEDY)], 1, stats)
    assert 1 <= len(steps) < 40
    assert stats.decode_steps > 380


def test_a_draft_that_was_switched_off_for_long_catches_up(oracle):
    """Its cache lags behind by what was made without it, in several slots by different numbers of tokens."""
    engine = with_draft(oracle, oracle)
    requests = [Request(random_ids(5 * n, n), 90, GREEDY) for n in (1, 2, 3)]
    expected = tokens_of(our_engine(oracle), requests, 3)
    calls = Counter()

    def waits(prompt):
        return Fixed(prompt, lambda ids, most: [2000][:most])

    from modelscope_dolly.engine.speculative.draft_model import DraftState

    offer = DraftState.offer

    def late(self, most):
        calls[id(self)] += 1
        return offer(self, most) if calls[id(self)] % 20 > 15 else []

    stats = RunStats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftState, "offer", late)
        assert tokens_of(engine, [replace(one, proposer=waits) for one in requests], 3, stats) == expected
    assert stats.accepted == stats.proposed > 50
    assert stats.decode_steps > 20


# ---- when speculation does not pay


def test_draft_tokens_that_are_rejected_end_by_themselves(oracle, engine):
    """Free text: the lookup finds matches that are not followed by what it says."""
    steep = StepTimer()
    for size in (1, 2, 16) * 3:
        steep.add(size, 1 + 0.2 * (size - 1))
    steep.add = lambda tokens, seconds: None
    rng = random.Random(0)
    prompt = [rng.randrange(1, 6) for _ in range(200)]  # every pair has been seen
    stats = RunStats()
    slow = replace(engine, timer=steep)
    request = Request(prompt, 200, Sampling(seed=1, temperature=3.0, top_p=1.0), proposer=PromptLookup)
    list(slow.run([request], 1, stats))
    assert stats.proposed < 10


def test_a_step_of_one_token_is_as_ever_where_nothing_is_proposed(oracle):
    engine, steps = our_engine(oracle), []
    hook = engine.net.register_forward_pre_hook(lambda net, inputs: steps.append(inputs[1]))
    engine.generate([Request([1, 2, 3], 5, GREEDY), Request([4], 5, GREEDY, proposer=PromptLookup)], slots=2)
    hook.remove()
    assert all(step.verify_spans is None for step in steps)


def test_a_proposer_goes_with_its_sequence_and_not_with_pythons_collector(engine):
    """Its tables are as large as the prompt; where callers always wait, the collector comes by once in minutes."""
    left: WeakSet[PromptLookup] = WeakSet()

    def make(ids: list[int]) -> PromptLookup:
        proposer = PromptLookup(ids)
        left.add(proposer)
        return proposer

    gc.collect()
    gc.disable()
    try:
        tokens_of(engine, [Request(random_ids(40, seed), 6, GREEDY, proposer=make) for seed in range(5)], 2)
        assert not left
    finally:
        gc.enable()
