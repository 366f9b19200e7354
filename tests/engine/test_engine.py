"""The decode loop: the tokens of transformers' generate, whatever the slots, the order and the neighbours are."""

from __future__ import annotations

import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request, RunStats
from modelscope_dolly.errors import HardwareError, PromptError
from tests.support.models import our_engine, random_model

GREEDY = Sampling(do_sample=False)
LENGTHS = (1, 2, 3, 5, 16, 31, 63, 64, 65, 100, 127, 128, 129, 255, 400, 511, 777, 1023, 1500, 2040)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(1, 1024, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(model, ids: list[int], new_tokens: int, **options) -> list[int]:
    """What transformers makes of the same prompt, alone, greedily."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    tokens = torch.tensor([ids])
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, **settings)
    return made[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def engine(oracle) -> Engine:
    return our_engine(oracle)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Prompts of all lengths, shuffled, that want different numbers of tokens."""
    lengths = list(LENGTHS)
    random.Random(1).shuffle(lengths)
    return [Request(random_ids(n, n), 8 - n % 5, GREEDY) for n in lengths]


@pytest.fixture(scope="module")
def greedy(oracle, requests) -> list[list[int]]:
    return [reference(oracle, list(one.ids), one.max_new_tokens) for one in requests]


@pytest.fixture(scope="module")
def varied() -> list[Request]:
    """Sampled requests that all differ in their settings and end after 1 to 40 tokens."""
    rng = random.Random(2)
    return [
        Request(
            random_ids(rng.randint(1, 90), seed),
            rng.randint(1, 40),
            Sampling(
                temperature=rng.choice((0.7, 1.0, 1.5)),
                top_k=rng.choice((0, 20)),
                top_p=rng.choice((0.92, 1.0)),
                repetition_penalty=rng.choice((1.0, 1.2)),
                seed=seed,
            ),
            stop_ids=frozenset(range(0, 1024, 30)),
        )
        for seed in range(18)
    ]


@pytest.fixture(scope="module")
def alone(engine, varied) -> list[list[int]]:
    """Their answers one by one."""
    return [engine.generate([request])[0] for request in varied]


@pytest.fixture
def passes(engine):
    """(tokens, prompts) of every pass through the network; 0 prompts in a decode step."""
    seen: list[tuple[int, int]] = []
    hook = engine.net.register_forward_pre_hook(
        lambda net, inputs: seen.append((len(inputs[0]), len(inputs[1].spans or ())))
    )
    yield seen
    hook.remove()


def test_greedy_answers_one_by_one_are_those_of_transformers(engine, requests, greedy):
    assert sorted(len(request.ids) for request in requests) == sorted(LENGTHS)
    assert [engine.generate([request])[0] for request in requests] == greedy


@pytest.mark.parametrize("slots", [2, 3, 8, 100])
def test_greedy_answers_in_slots_are_those_of_transformers_in_order(engine, requests, greedy, slots):
    assert engine.generate(requests, slots) == greedy


def test_repetition_penalty_gives_the_answers_of_transformers(oracle, engine):
    asked = [Request(random_ids(n, n), 30, replace(GREEDY, repetition_penalty=1.3)) for n in (1, 7, 64, 300)]
    expected = [reference(oracle, list(one.ids), 30, repetition_penalty=1.3) for one in asked]
    assert engine.generate(asked, slots=3) == expected
    assert expected != [reference(oracle, list(one.ids), 30) for one in asked]


@pytest.mark.parametrize("changes", [{"use_parallel_residual": False, "rotary_pct": 1.0}, {"attention_bias": False}])
def test_other_networks_of_the_family_give_the_answers_of_transformers(changes):
    model = random_model(seed=5, **changes)
    asked = [Request(random_ids(n, n), 20, GREEDY) for n in (1, 33, 64, 200)]
    expected = [reference(model, list(one.ids), 20) for one in asked]
    assert our_engine(model).generate(asked, slots=3) == expected


@pytest.mark.parametrize("slots", [2, 5, 18])
def test_sampled_answers_do_not_depend_on_slots(engine, varied, alone, slots):
    assert len({len(answer) for answer in alone}) > 5
    assert engine.generate(varied, slots) == alone


def test_sampled_answers_do_not_depend_on_order_or_neighbours(engine, varied, alone):
    for seed in range(4):
        order = random.Random(seed).sample(range(len(varied)), len(varied) - 3 * seed)
        assert engine.generate([varied[i] for i in order], slots=4) == [alone[i] for i in order]


def test_stop_ids_end_answers_as_in_transformers_and_are_their_last_id(oracle, engine):
    asked, expected = [], []
    for n in (1, 10, 50, 64, 130):
        ids = random_ids(n, n)
        stops = frozenset(reference(oracle, ids, 12)[n % 7 + 1 : n % 7 + 3])
        asked.append(Request(ids, 12, GREEDY, stop_ids=stops))
        expected.append(reference(oracle, ids, 12, eos_token_id=sorted(stops)))
    answers: list[list[int]] = [[] for _ in asked]
    ended = {}
    for token in engine.run(asked, slots=2):
        answers[token.index].append(token.id)
        assert token.index not in ended
        if token.finish_reason:
            ended[token.index] = token.finish_reason
    assert answers == expected
    assert ended == dict.fromkeys(range(len(asked)), "stop")
    assert all(answer[-1] in one.stop_ids for answer, one in zip(answers, asked, strict=True))
    assert not any(set(answer[:-1]) & one.stop_ids for answer, one in zip(answers, asked, strict=True))


def test_on_token_sees_each_id_but_the_stop_id_and_can_end_the_answer(engine):
    ids = random_ids(20, 3)
    whole = engine.generate([Request(ids, 10, GREEDY)])[0]
    seen: list[int] = []

    def on_token(token_id: int) -> bool:
        seen.append(token_id)
        return len(seen) == 4

    tokens = list(engine.run([Request(ids, 10, GREEDY, on_token=on_token), Request(ids, 10, GREEDY)], slots=2))
    assert [token.id for token in tokens if token.index == 0] == whole[:4] == seen
    assert [token.finish_reason for token in tokens if token.index == 0] == [None, None, None, "stop"]
    assert [token.id for token in tokens if token.index == 1] == whole

    seen.clear()
    stop = frozenset(whole[2:3])
    place = whole.index(whole[2])
    assert engine.generate([Request(ids, 10, GREEDY, stop, on_token)])[0] == whole[: place + 1]
    assert seen == whole[:place]


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65])
def test_max_new_tokens_is_kept_to_the_token(engine, count):
    tokens = list(engine.run([Request(random_ids(5, 5), count, GREEDY)]))
    assert [token.finish_reason for token in tokens] == [None] * (count - 1) + ["length"]


def test_an_answer_may_fill_the_window(oracle, engine):
    ids = random_ids(2000, 8)
    assert engine.generate([Request(ids, 48, GREEDY)])[0] == reference(oracle, ids, 48)


@pytest.mark.parametrize("bad", [Request([], 4), Request([1] * 2041, 8), Request([1], 0), Request([1], 2048)])
def test_a_request_that_does_not_fit_is_an_error_before_anything_runs(engine, passes, bad):
    good = Request(random_ids(3, 3), 2)
    with pytest.raises(PromptError, match=f"prompt of {len(bad.ids)} tokens and {bad.max_new_tokens} new .* 2048"):
        engine.generate([good, bad, good], slots=2)
    assert passes == []


def test_no_requests_make_no_tokens(engine, passes):
    assert engine.generate([], slots=4) == []
    assert passes == []


def test_a_closed_run_frees_its_slots_at_the_next_step(engine, passes, varied, alone):
    run = engine.run(varied, slots=4)
    for _ in range(7):
        next(run)
    run.close()
    assert next(run, None) is None
    engine.generate([Request([1], 1, GREEDY)])  # behind it in the mailbox
    assert engine._state.scheduler.running == [] and not engine._state.scheduler.waiting
    before = len(passes)
    assert engine.generate(varied, slots=4) == alone
    assert len(passes) > before


def test_the_caller_runs_outside_inference_mode(engine, varied):
    visited = 0
    for _ in engine.run(varied[:3], slots=2):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        visited += 1
    assert visited > 3


def test_interleaved_runs_do_not_disturb_each_other(engine, varied, alone):
    runs = {"forth": engine.run(varied, slots=3), "back": engine.run(varied[::-1], slots=4)}
    answers = {name: [[] for _ in varied] for name in runs}
    waiting = deque(runs)
    while waiting:
        name = waiting.popleft()
        token = next(runs[name], None)
        if token is not None:
            answers[name][token.index].append(token.id)
            waiting.append(name)
    assert answers == {"forth": alone, "back": alone[::-1]}


def test_threads_get_the_answers_of_sequential_calls(engine, varied, alone):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda slots: engine.generate(varied, slots), (1, 2, 3, 8)))
    assert found == [alone] * 4


def simulated_steps(lengths: list[int], slots: int) -> int:
    """Decode steps when every free slot takes the next request at once, whose first token is made by prefill."""
    waiting, active, steps = deque(lengths), [], 0
    while waiting or active:
        while waiting and len(active) < slots:
            left = waiting.popleft() - 1
            active += [left] if left else []
        if active:
            active = [left - 1 for left in active if left > 1]
            steps += 1
    return steps


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
def test_slots_are_never_idle_while_requests_wait(engine, slots):
    rng = random.Random(3)
    lengths = [rng.choice((1, 2, 5, 20, 60)) for _ in range(30)]
    requests = [Request(random_ids(rng.randint(1, 40), i), n, GREEDY) for i, n in enumerate(lengths)]
    stats = RunStats()
    answers: list[int] = [0] * len(requests)
    for token in engine.run(requests, slots, stats):
        answers[token.index] += 1
    assert answers == lengths
    assert stats.prefill_tokens == sum(len(request.ids) for request in requests)
    assert stats.decode_tokens == sum(lengths) - len(lengths)  # prefill makes the first one
    assert stats.decode_steps == simulated_steps(lengths, slots)
    static = sum(max(lengths[i : i + slots]) - 1 for i in range(0, len(lengths), slots))
    assert slots == 1 or stats.decode_steps < 0.8 * static
    # Only the drain at the end, at most one answer long, may leave slots empty.
    assert stats.decode_steps * slots - stats.decode_tokens <= (slots - 1) * max(lengths)
    assert stats.decode_tokens / (stats.decode_steps * slots) > 0.75


def test_prompts_are_prefilled_together_up_to_the_limit(engine, passes, monkeypatch):
    monkeypatch.setattr("modelscope_dolly.engine.scheduler.PREFILL_TOKENS", 100)
    lengths = [45, 45, 45, 99, 1, 150, 1, 98]
    engine.generate([Request(random_ids(n, n), 1, GREEDY) for n in lengths], slots=len(lengths))
    # Without padding, in order; a prompt above the limit goes alone.
    assert passes == [(90, 2), (45, 1), (100, 2), (150, 1), (99, 2)]


def test_free_slots_are_filled_by_one_prefill(engine, passes):
    engine.generate([Request(random_ids(4, i), 3, GREEDY) for i in range(6)], slots=3)
    assert passes == [(12, 3), (3, 0), (3, 0)] * 2


def test_running_out_of_memory_is_an_error_that_names_the_remedy(engine, varied, alone):
    def fail(net, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = engine.net.register_forward_pre_hook(fail)
    try:
        with pytest.raises(HardwareError, match=r"out of memory with \d+ sequences .* smaller batch_size"):
            engine.generate(varied, slots=3)
    finally:
        hook.remove()
    assert engine.generate(varied, slots=3) == alone  # the lock of a failed pass is free again


def test_output_that_is_not_finite_is_an_error_and_no_answer():
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(HardwareError, match="not finite in float32"):
        our_engine(model).generate([Request([1, 2, 3], 5)])
