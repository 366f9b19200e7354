"""Recorded decode steps on a real CUDA device. Skipped where there is none."""

from __future__ import annotations

import random

import pytest
import torch

from modelscope_dolly.engine.cuda_graphs import GraphCapture
from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.kernels import triton_decode as triton_kernels
from modelscope_dolly.kernels import varlen_attention as varlen
from modelscope_dolly.load import load
from tests.support.models import our_engine, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def engines(dtype: torch.dtype) -> tuple[Engine, Engine]:
    """The same network step by step, and recorded."""
    device = torch.device("cuda", 0)
    pair = []
    for _ in range(2):
        engine = our_engine(random_model().to(dtype))
        engine.net.to(device)
        pair.append(Engine(engine.net, device, engine.window))
    pair[1].capture = GraphCapture(pair[1].net, device)
    return pair[0], pair[1]


def requests() -> list[Request]:
    rng = random.Random(1)
    return [
        Request(
            torch.randint(1, 1024, (rng.randint(1, 200),), generator=torch.Generator().manual_seed(seed)).tolist(),
            rng.randint(1, 60),
            Sampling(do_sample=seed % 3 != 0, repetition_penalty=1.2 if seed % 5 == 0 else 1.0, seed=seed),
            stop_ids=frozenset(range(0, 1024, 60)),
        )
        for seed in range(24)
    ]


@pytest.mark.parametrize("slots", [1, 5, 24])
def test_recorded_steps_make_the_tokens_of_the_ordinary_ones_in_float32(slots):
    plain, recorded = engines(torch.float32)
    names = [name for name, _ in recorded.capture.forwards]
    assert recorded.generate(requests(), slots) == plain.generate(requests(), slots)
    assert [name for name, _ in recorded.capture.forwards] == names  # nothing was given up


def test_the_fused_kernels_are_those_in_use_and_survive_their_check_in_bfloat16():
    _, recorded = engines(torch.bfloat16)
    if not triton_kernels.usable(recorded.device):
        pytest.skip("Triton is not installed, or the card is older than Ampere")
    recorded.generate(requests(), 8)
    assert [name for name, _ in recorded.capture.forwards] == ["the fused kernels", "torch's kernels"]


def test_without_the_fused_kernels_recordings_work_too():
    plain, recorded = engines(torch.float32)
    recorded.capture.forwards = recorded.capture.forwards[-1:]
    assert recorded.generate(requests(), 4) == plain.generate(requests(), 4)
    assert len(recorded.capture.forwards) == 1


def test_attention_of_variable_length_passes_its_trial():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the card is older than Ampere")
    assert varlen.works(torch.empty(1, 1, 80, dtype=torch.bfloat16, device="cuda:0"))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights_answer_on_the_gpu(checkpoint_dir, quantize):
    dolly = load(checkpoint_dir, "cuda:0", "fp32", quantize=quantize)
    settings = GenerationSettings().updated({"max_new_tokens": 30, "do_sample": False})
    prompts = [Prompt("Name a colour."), Prompt("Why?")]
    decoder, dolly.text_generator.engine.capture = dolly.text_generator.engine.capture, None
    expected = [updates[0].text for updates in dolly.text_generator.generate(prompts, settings, 2)]
    dolly.text_generator.engine.capture = decoder
    assert [updates[0].text for updates in dolly.text_generator.generate(prompts, settings, 2)] == expected
