"""Captured decode steps: the tokens of the engine without them, nothing that waits for the host, and a way back.

The CUDA graph is replaced by a recording of torch's operations (recorded.py): everything else is what runs on a GPU.
"""

from __future__ import annotations

import itertools
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch

from modelscope_dolly.engine import cuda_graphs as decode
from modelscope_dolly.engine.cuda_graphs import BURST, GraphCapture, StepBuffers, batch_size, burst
from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.gpt_neox_fused import can_fuse, fused_forward
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.sampling import Sampler, Sampling
from modelscope_dolly.engine.sequence import Request, RunStats
from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.errors import HardwareError, SettingError
from modelscope_dolly.kernels import cpu as kernels
from modelscope_dolly.kernels import triton_decode as triton_kernels
from modelscope_dolly.kernels import varlen_attention as varlen
from tests.support.models import our_engine, our_network, quantised, random_model, tiny_config
from tests.support.recorded import Recorder, on_one_device

GREEDY = Sampling(do_sample=False)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(1, 1024, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def capturing(model, record=None) -> Engine:
    """An engine whose steps are captured."""
    engine = our_engine(model)
    engine.capture = GraphCapture(engine.net, engine.device, record or Recorder())
    return engine


@pytest.fixture(scope="module")
def plain(oracle) -> Engine:
    return our_engine(oracle)


@pytest.fixture(scope="module")
def varied() -> list[Request]:
    """Greedy and sampled requests that differ in all settings and end after 1 to 60 tokens, by themselves or not."""
    rng = random.Random(4)
    return [
        Request(
            random_ids(rng.randint(1, 90), seed),
            rng.randint(1, 60),
            Sampling(
                do_sample=seed % 4 != 0,
                temperature=rng.choice((0.7, 1.0, 1.5)),
                top_k=rng.choice((0, 20)),
                top_p=rng.choice((0.92, 1.0)),
                repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
                seed=seed,
            ),
            stop_ids=frozenset(range(0, 1024, 60)),
        )
        for seed in range(20)
    ]


@pytest.fixture(scope="module")
def alone(plain, varied) -> list[list[int]]:
    return plain.generate(varied)


@pytest.mark.parametrize("slots", [1, 3, 8, 20])
def test_captured_steps_make_the_tokens_of_the_ordinary_ones(oracle, varied, alone, slots):
    engine = capturing(oracle)
    assert engine.generate(varied, slots) == alone
    assert engine.capture.capture.recordings > 0
    assert len(engine.capture.forwards) == 1  # none was given up


def test_a_second_run_captures_nothing_anew_and_does_not_see_the_first(oracle, varied, alone, monkeypatch):
    monkeypatch.setattr(decode, "BURST_SECONDS", 0.0)  # both runs then meet the same batch sizes
    engine = capturing(oracle)
    assert engine.generate(varied, 4) == alone
    made = engine.capture.capture.recordings
    assert engine.generate(varied, 4) == alone
    assert engine.capture.capture.recordings == made
    assert engine.generate(varied[3::-1], 2) == alone[3::-1]  # fewer slots and a shorter cache than there are


def test_a_larger_run_makes_a_larger_cache(oracle, plain, varied, alone):
    engine = capturing(oracle)
    assert engine.generate(varied[:2], 1) == alone[:2]
    cache = engine._state.runner.cache
    assert (cache.slots, cache.length) == (1, decode.CACHE_STEP)
    assert engine.generate(varied, 6) == alone
    assert engine._state.runner.cache is cache and (cache.slots, cache.length) == (8, decode.CACHE_STEP)
    long = [Request(random_ids(decode.CACHE_STEP, 1), 4, GREEDY)]
    assert engine.generate(long) == plain.generate(long)
    assert (cache.slots, cache.length) == (8, 2 * decode.CACHE_STEP)


def test_several_steps_run_between_two_looks_and_nothing_follows_the_end(oracle, plain, monkeypatch):
    engine, bursts = capturing(oracle), []
    run = StepBuffers.run
    monkeypatch.setattr(StepBuffers, "run", lambda *given: bursts.append(given[2]) or run(*given))
    monkeypatch.setattr(decode, "BURST_SECONDS", 1e9)
    requests = [Request(random_ids(5, seed), 40, GREEDY) for seed in range(2)]
    stats = RunStats()
    tokens = list(engine.run(requests, 2, stats))
    assert [[one.id for one in tokens if one.index == i] for i in (0, 1)] == plain.generate(requests)
    assert bursts == [1, 1, 1, BURST, BURST, 4]  # the first steps are measured; the last are those that are left
    assert stats.decode_steps == 39 and stats.decode_tokens == 78

    stop = tokens[20].id  # in the middle of a burst
    bursts.clear()
    stopping = [Request(one.ids, 40, GREEDY, stop_ids=frozenset({stop})) for one in requests]
    assert engine.generate(stopping, 2) == plain.generate(stopping)
    assert max(bursts) == BURST


def test_the_last_place_of_the_window_can_be_reached(oracle, plain):
    requests = [Request(random_ids(2040, 1), 8, GREEDY), Request(random_ids(2000, 2), 48, Sampling(seed=1))]
    assert capturing(oracle).generate(requests, 2) == plain.generate(requests, 2)


def test_sequences_that_are_watched_or_have_draft_tokens_are_looked_at_after_each_step(oracle, plain):
    pattern = random_ids(6, 3) * 8

    def requests(seen: list) -> list[Request]:
        guessing = Request(pattern, 30, GREEDY, proposer=PromptLookup)
        watched = Request(
            random_ids(9, 5), 30, Sampling(seed=3), on_token=lambda token: seen.append(token) or len(seen) > 9
        )
        return [guessing, watched]

    seen, expected = [], []
    assert capturing(oracle).generate(requests(seen), 2) == plain.generate(requests(expected), 2)
    assert seen == expected and len(seen) == 10


def test_a_closed_run_leaves_the_graphs_for_the_next(oracle, varied, alone):
    engine = capturing(oracle)
    run = engine.run(varied, 4)
    assert len(list(islice(run, 30))) == 30
    run.close()
    assert engine.generate(varied[:1]) == alone[:1]  # behind it: what was closed is gone
    kept = engine.capture._graphs
    assert engine.generate(varied, 4) == alone and engine.capture._graphs is kept is not None


def test_runs_at_the_same_time_share_the_graphs(oracle, varied, alone):
    engine = capturing(oracle)
    first, second = engine.run(varied, 3), engine.run(varied, 3)
    answers: list[list[list[int]]] = [[[] for _ in varied] for _ in range(2)]
    for pair in zip(first, second, strict=True):
        for found, token in zip(answers, pair, strict=True):
            found[token.index].append(token.id)
    assert answers == [alone, alone]


def test_threads_take_turns(oracle, varied, alone):
    # a recording by TorchDispatchMode belongs to its thread, so they are made before
    engine = capturing(oracle)
    assert engine.generate(varied, 4) == alone
    with ThreadPoolExecutor(3) as pool:
        engine.capture.capture = lambda step: step
        assert list(pool.map(lambda _: engine.generate(varied, 4), range(3))) == [alone] * 3


def wrong(self, tokens, positions, cache):
    logits = GraphCapture._plain(self, tokens, positions, cache)
    return logits.flip(-1)


def plainly(self, tokens, positions, cache):
    return GraphCapture._plain(self, tokens, positions, cache)


def broken(self, tokens, positions, cache):
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.mark.parametrize(
    "forward, reason", [(wrong, "of their spread away"), (broken, "RuntimeError: no kernel image")]
)
def test_a_forward_that_is_wrong_or_fails_is_given_up_with_a_warning(oracle, varied, alone, caplog, forward, reason):
    engine = capturing(oracle)
    capture = engine.capture
    capture.forwards.insert(0, ("the fast kernels", lambda *step: forward(capture, *step)))
    with caplog.at_level(logging.WARNING, "modelscope.dolly"):
        assert engine.generate(varied, 4) == alone
    assert [name for name, _ in capture.forwards] == ["torch's kernels"]
    [message] = caplog.messages
    assert "the fast kernels cannot be used on cpu" in message and reason in message and "\n" not in message


def test_a_forward_that_fails_for_one_batch_size_is_given_up_for_all(oracle, varied, alone):
    engine = capturing(oracle)
    capture = engine.capture
    capture.forwards.insert(
        0, ("the fast kernels", lambda *step: (wrong if len(step[0]) == 1 else plainly)(capture, *step))
    )
    assert engine.generate(varied, 4) == alone
    assert {buffers._forward for buffers in capture._graphs._buffers.values()} == {capture.forwards[0][1]}


def test_without_any_graph_the_engine_computes_step_by_step(oracle, varied, alone, caplog):
    def no_graphs(step):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    engine = capturing(oracle, no_graphs)
    assert engine.generate(varied, 4) == alone
    assert engine.capture.forwards == [] and len(caplog.messages) == 1


def test_memory_that_runs_out_is_one_error(oracle, varied):
    def no_memory(step):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(HardwareError, match="out of memory with 4 sequences of up to 256 tokens"):
        capturing(oracle, no_memory).generate(varied, 4)


def test_output_that_is_not_finite_is_an_error_and_its_cache_is_not_kept(varied):
    model = random_model()
    engine = capturing(model)
    engine.generate(varied[:4], 4)
    version = engine._state.runner.cache.version
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(HardwareError, match="not finite in float32"):
        engine.generate(varied[:4], 4)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = 0.0
    engine.generate(varied[:1])
    assert engine._state.runner.cache.version > version


@pytest.mark.parametrize("penalised", [False, True])
def test_a_step_stays_on_its_device(oracle, penalised):
    """On meta tensors: whatever needs a number on the host fails, and nothing may come from the CPU."""
    net = our_network(oracle).to("meta")
    cache = KVCache(4, 64)
    for index in range(3):
        cache.layer_cache(index, torch.empty(4, 4, 16, device="meta"))
    capture = GraphCapture(net, torch.device("meta"), lambda step: step)
    buffers = StepBuffers(capture, cache, capture._plain, 4, True, penalised)
    net.gpt_neox.layers[0].attention.rotary(torch.empty(1, device="meta"), torch.float32)
    with on_one_device("meta"), torch.inference_mode():
        buffers.step()
    assert buffers.logits.device.type == "meta" and buffers.logits.shape == (4, 1024)


def test_rows_without_an_answer_disturb_nobody(oracle, plain):
    """Three sequences in a graph for four, beside a slot that holds an old text."""
    requests = [Request(random_ids(20 + n, n), 25 if n else 5, Sampling(seed=n)) for n in range(4)]
    assert capturing(oracle).generate(requests, 4) == plain.generate(requests)


def test_batch_sizes_and_bursts():
    assert [batch_size(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 63, 64, 65)] == [1, 2, 4, 8, 8, 16, 16, 24, 64, 64, 72]
    assert burst(1.0, [50]) == 1 and burst(0.0, [50]) == BURST and burst(0.005, [50]) == 6
    assert burst(0.0, [3, 2]) == 3


def test_a_network_of_another_build_is_not_fused():
    for changes in ({"use_parallel_residual": False}, {"hidden_act": "relu"}):
        assert not can_fuse(our_network(random_model(**changes)))
    assert can_fuse(our_network(random_model()))


def test_the_environment_chooses_how_steps_are_computed(oracle, monkeypatch):
    monkeypatch.setattr(triton_kernels, "usable", lambda device: True)
    names = {}
    for found in ("", "fused", "recorded"):
        monkeypatch.setenv("DOLLY_DECODE", found)
        names[found] = [name for name, _ in capturing(oracle).capture.forwards]
    assert names == {
        "": names["fused"],
        "fused": ["the fused kernels", *names["recorded"]],
        "recorded": ["torch's kernels"],
    }
    monkeypatch.setenv("DOLLY_DECODE", "fast")
    with pytest.raises(SettingError, match=r"unknown DOLLY_DECODE 'fast'\. Allowed: fused, plain, recorded"):
        decode.decode_mode()


def test_settings_of_a_sampler_fit_the_device(oracle):
    """Seeds up to the largest, and their keys as signed numbers."""
    for seed in (0, 1, 2**32 - 1):
        whole, others = Sampler(Sampling(seed=seed, top_k=3), []).settings()
        assert torch.tensor(whole).dtype == torch.int64 and len(whole) == 4 and len(others) == 3


@pytest.fixture
def fused(monkeypatch):
    """The fused kernels in use on the CPU, in Triton's interpreter; a recording notes each launch as one call."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(triton_kernels, "usable", lambda device: True)

    def recorder() -> Recorder:
        made = Recorder()
        for name in ("linear", "two_norms", "attend"):
            monkeypatch.setattr(triton_kernels, name, made.noting(getattr(triton_kernels, name)))
        return made

    return recorder


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_fused_step_makes_the_tokens_of_the_ordinary_one(fused, monkeypatch, quantize):
    monkeypatch.setattr(kernels, "_library", lambda: None)  # weights as they lie on a GPU
    net = our_network(random_model(num_hidden_layers=1, vocab_size=128))  # small: the interpreter is slow
    net = quantised(net, quantize) if quantize else net
    engine = Engine(net, torch.device("cpu"), 2048)
    prompts = [[token % 128 for token in random_ids(4 + 7 * n, n)] for n in range(3)]
    requests = [Request(ids, 4, GREEDY if n % 2 else Sampling(seed=n)) for n, ids in enumerate(prompts)]
    expected = engine.generate(requests, 3)
    capture = engine.capture = GraphCapture(net, engine.device, fused())
    assert engine.generate(requests, 3) == expected
    assert [name for name, _ in capture.forwards] == ["the fused kernels", "torch's kernels"]  # passed its check
    assert capture.capture.launches > 0


@torch.inference_mode()
@pytest.mark.parametrize("changes", [{}, {"rotary_pct": 1.0}, {"attention_bias": False}, {"num_attention_heads": 1}])
def test_logits_of_the_fused_step_are_those_of_the_network(fused, changes):
    net = our_network(random_model(num_hidden_layers=2, vocab_size=128, **changes))
    for name, parameter in net.named_parameters():
        if "norm" in name:  # the two of a layer are equal at first
            parameter.copy_(torch.rand(parameter.shape))
    prompts = [[token % 128 for token in random_ids(n, n)] for n in (9, 1, 30)]
    caches = []
    for _ in range(2):
        cache = KVCache(3, 64)
        net(torch.tensor([*itertools.chain(*prompts)]), StepInput.prefill([len(ids) for ids in prompts]), cache)
        caches.append(cache)
    positions, tokens = torch.tensor([len(ids) for ids in prompts]), torch.tensor([7, 8, 9])
    expected = net(tokens, StepInput.decode(positions.tolist()), caches[0])
    found = fused_forward(net, tokens, positions, caches[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for index in range(2):
        for mine, theirs in zip(caches[1]._layers[index], caches[0]._layers[index], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_all_passes_of_a_run_stay_on_a_cuda_device(monkeypatch):
    """Tensors without numbers, which need a torch for CUDA and no GPU: devices and shapes as torch knows them there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("cuda", 0)
    monkeypatch.setattr(varlen, "works", lambda query, dropout=0.0: True)
    with FakeTensorMode(), torch.no_grad(), torch.device(device):
        net = GPTNeoX(tiny_config())
        for parameter in net.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        cache = KVCache(4, 256)
        logits = net(torch.tensor([1, 2, 3, 4]), StepInput.prefill([2, 2]), cache)
        assert logits.device == device and logits.shape == (2, 1024)
        capture = GraphCapture(net, device, lambda step: step)
        buffers = StepBuffers(capture, cache, capture._plain, 4, True, True)
        buffers.step()
        assert buffers.logits.device == device and buffers.logits.shape == (4, 1024)
        logits = net(torch.tensor([5, 6, 7]), StepInput.verify([(0, 2, 2), (1, 2, 1)]), cache)
        assert logits.device == device and logits.shape == (3, 1024)
