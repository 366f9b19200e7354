"""The kernels of a decode step inside CUDA graphs. What they compute is tested in tests/test_triton_kernels.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from modelscope_dolly.kernels import quantized_linear as quantize
from modelscope_dolly.kernels import triton_decode as triton_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not triton_kernels.usable(torch.device("cuda")), reason="no CUDA device of capability 8.0, or no Triton"
    ),
]

E, HEADS, WIDTH, TURNED, LENGTH = 2560, 32, 80, 20, 96


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def replayed(call: Callable[[], object], change: Callable[[], None]) -> tuple[object, object]:
    """What a recording of `call` gives after `change` altered its inputs, and what the call itself gives then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    change()
    graph.replay()
    torch.cuda.synchronize()
    return out, call()


@pytest.mark.parametrize("rows", [1, 5, 16, 64])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_linear_in_a_graph(kind, rows):
    weight, scales = random(E, E, seed=1), None
    if kind != "plain":
        stored = quantize.stored_tensors("w", weight.float().cpu(), kind, quantize.ROWS)
        weight, scales = stored[f"w_{kind}"].cuda(), stored["w_scale"].cuda()
    x, bias, residual = random(rows, E), random(E, seed=2), random(rows, E, seed=3)
    out, now = replayed(
        lambda: triton_kernels.linear(x, weight, scales, bias, gelu=True, residual=residual),
        lambda: x.copy_(random(rows, E, seed=4)),
    )
    assert torch.equal(out, now)


def test_norms_in_a_graph():
    first, second = nn.LayerNorm(E, device="cuda", dtype=torch.bfloat16), nn.LayerNorm(E, device="cuda")
    x = random(3, E)
    out, now = replayed(lambda: triton_kernels.two_norms(x, first, second), lambda: x.copy_(random(3, E, seed=4)))
    assert all(map(torch.equal, out, now))


def test_attention_in_a_graph_reads_as_far_as_the_positions_of_the_replay():
    mixed, cos, sin = random(3, HEADS, 3, WIDTH), random(3, TURNED, seed=1), random(3, TURNED, seed=2)
    keys, values = (random(4, HEADS, LENGTH, WIDTH, seed=seed) for seed in (3, 4))
    positions = torch.tensor([0, 1, 2], device="cuda")
    out, now = replayed(
        lambda: triton_kernels.attend(mixed, cos, sin, keys, values, positions),
        lambda: positions.copy_(torch.tensor([95, 40, 64])),
    )
    assert torch.equal(out, now)


def test_a_launch_is_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, weight = (random(*shape).to("cuda:1") for shape in ((2, 512), (64, 512)))
    found = triton_kernels.linear(x, weight)
    assert found.device == x.device
    torch.testing.assert_close(found, x @ weight.T, rtol=0.02, atol=0.05)
