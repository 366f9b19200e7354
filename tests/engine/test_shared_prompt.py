"""Several answers to one prompt: it is read once, and the answers are those of as many requests on their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelscope_dolly.engine import runner
from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request, RunStats
from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from tests.support.models import our_engine

PROMPT = torch.randint(1, 1024, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def engine(oracle) -> Engine:
    return our_engine(oracle)


@pytest.fixture(scope="module")
def alone(engine) -> list[list[int]]:
    return [engine.generate([one])[0] for one in requests(list(PROMPT), 5)]


def requests(ids: list[int], count: int, **options) -> list[Request]:
    return [Request(ids, 4 + 3 * n, Sampling(seed=n, temperature=1.5, top_p=1.0), **options) for n in range(count)]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_answers_are_those_of_requests_on_their_own_and_the_prompt_is_read_once(engine, alone, slots):
    stats = RunStats()
    answers: list[list[int]] = [[] for _ in alone]
    for token in engine.run(requests(PROMPT, 5), slots, stats):
        answers[token.index].append(token.id)
    assert answers == alone and len(set(map(tuple, alone))) == 5
    assert stats.prefill_tokens == len(PROMPT)


def test_without_memory_to_keep_it_the_prompt_is_read_again(engine, alone, monkeypatch):
    monkeypatch.setattr(runner, "free_memory", lambda device: 0)
    monkeypatch.setattr(runner.Runner, "fits", lambda *_: True)
    monkeypatch.setattr(runner.Runner, "_has_memory", lambda *_: True)
    stats = RunStats()
    answers: list[list[int]] = [[] for _ in alone]
    for token in engine.run(requests(PROMPT, 5), 2, stats):
        answers[token.index].append(token.id)
    assert answers == alone
    assert stats.prefill_tokens > len(PROMPT)


def test_speculation_and_neighbours_change_nothing(engine, alone):
    ids, other = list(PROMPT), Request(list(PROMPT[:40]), 9, Sampling(do_sample=False))
    mixed = [other, *requests(ids, 5, proposer=PromptLookup), replace(other, ids=list(other.ids))]
    found = engine.generate(mixed, slots=3)
    assert found[1:-1] == alone
    assert found[0] == found[-1] == engine.generate([other])[0]


def test_the_first_one_may_be_cancelled(engine, alone):
    call = engine.submit(requests(PROMPT, 5), slots=2)
    answers: list[list[int]] = [[] for _ in alone]
    for token in call:
        if token.index == 0 and call.sequences[0].finish_reason is None:
            call.sequences[0].finish_reason = "cancelled"
            call._open -= 1
        answers[token.index].append(token.id)
    assert answers[1:] == alone[1:] and len(answers[0]) < len(alone[0])
    assert all(sequence.shared is None for sequence in call.sequences)
