"""The variable-length kernel exists on GPUs only: here the same sums are done text by text, to test what is around."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch.nn import functional as F

from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.kernels import varlen_attention as varlen
from tests.support.models import our_engine


def by_text(query, key, value, ends, longest, scaling=None):
    """[N, H, D], what varlen.attend returns."""
    pairs = list(itertools.pairwise(ends.tolist()))
    assert pairs[0][0] == 0 and pairs[-1][1] == len(query) and longest == max(end - begin for begin, end in pairs)
    parts = [slice(*pair) for pair in pairs]
    texts = [tuple(tensor[part].transpose(0, 1) for tensor in (query, key, value)) for part in parts]
    done = [F.scaled_dot_product_attention(*text, is_causal=True, scale=scaling).transpose(0, 1) for text in texts]
    return torch.cat(done)


@pytest.fixture(autouse=True)
def forgetful():
    yield
    varlen._passes_self_test.cache_clear()


@pytest.mark.parametrize("slots", [1, 4])
def test_prompts_that_go_through_it_get_the_answers_of_the_ordinary_attention(oracle, monkeypatch, slots):
    requests = [
        Request(torch.randint(1, 1024, (n,), generator=torch.Generator().manual_seed(n)).tolist(), 6, Sampling(seed=n))
        for n in (3, 90, 1, 17, 40)
    ]
    expected = our_engine(oracle).generate(requests, slots)
    calls = []
    monkeypatch.setattr(varlen, "works", lambda query, dropout=0.0: True)
    monkeypatch.setattr(varlen, "attend", lambda *given: calls.append(given[3].tolist()) or by_text(*given))
    assert our_engine(oracle).generate(requests, slots) == expected
    assert len(calls) >= 3 * 2 and max(map(len, calls)) == slots + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_accepts_what_is_right(monkeypatch, caplog, dtype):
    monkeypatch.setattr(varlen, "attend", by_text)
    assert varlen._passes_self_test(torch.device("cpu"), dtype, 80)
    assert not caplog.messages


def across(query, key, value, ends, longest, scaling=None):
    """As one text: a kernel that misreads `ends`."""
    return by_text(query, key, value, torch.tensor([0, len(query)]), len(query))


def failing(*given):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")


@pytest.mark.parametrize("kernel, reason", [(across, "away from the ordinary one"), (failing, "only supports Ampere")])
def test_the_trial_refuses_what_is_wrong_and_says_so_once(monkeypatch, caplog, kernel, reason):
    monkeypatch.setattr(varlen, "attend", kernel)
    for _ in range(2):
        assert not varlen._passes_self_test(torch.device("cpu"), torch.bfloat16, 64)
    [message] = caplog.messages
    assert reason in message and "\n" not in message


def test_it_is_for_cuda_and_half_precision():
    assert not varlen.works(torch.zeros(2, 2, 8, dtype=torch.bfloat16))
    assert not varlen.works(torch.zeros(2, 2, 8, device="meta"))


def test_torch_has_the_function_with_the_arguments_that_are_passed():
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "is_causal"} & set(names)
