"""Quantised layers: their error, their place in the network, and torch in the place of the compiled library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.errors import SettingError
from modelscope_dolly.kernels import cpu as kernels
from modelscope_dolly.kernels.quantized_linear import (
    BF16Linear,
    Int4Linear,
    Int8Linear,
    is_linear,
    parse_quantize,
    quantise_int4,
    quantise_int8,
    replace_linears,
)
from tests.support.models import logits, our_network, prompts, quantised, random_model

CLASSES = {"int8": Int8Linear, "int4": Int4Linear, "bf16": BF16Linear}


@pytest.fixture(params=["library", "torch"])
def computed_by(request, monkeypatch):
    """Everything here holds with and without the compiled library."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_library", lambda: None)
    elif not kernels.level():
        pytest.skip("no compiler built the library, or it knows nothing of this processor")
    return request.param


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_int8_numbers_are_the_nearest():
    weight = random(20, 300)
    whole, scales = quantise_int8(weight)
    assert whole.dtype == torch.int8 and whole.abs().amax(dim=1).eq(127).all()
    assert ((whole * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()


def test_int4_numbers_use_all_levels_and_are_the_nearest_but_at_the_end_of_the_range():
    weight = random(20, 300)
    whole, scales = quantise_int4(weight)
    assert whole.shape == weight.shape and scales.shape == (20, 3) and scales.dtype == torch.float16
    wide = scales.float().repeat_interleave(128, dim=1)[:, :300]
    assert whole.min() == -8 and whole.max() == 7
    error = (whole * wide - weight).abs() / wide.abs()
    assert (error <= torch.where(whole == 7, 1.01, 0.51)).all()


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int4])
def test_zeros_stay_zeros(quantise):
    whole, scales = quantise(torch.zeros(3, 130))
    assert not whole.any() and not scales.any()


@pytest.mark.parametrize(("method", "error"), [("int8", 0.012), ("int4", 0.13), ("bf16", 0.004)])
def test_error_of_a_layer_on_random_numbers(computed_by, method, error):
    x, weight, bias = random(33, 640), random(90, 640, seed=1), random(90, seed=2)
    layer = CLASSES[method](640, 90)
    layer.take("weight", weight)
    layer.take("bias", bias)
    exact = x @ weight.T + bias
    assert error / 4 < ((layer(x) - exact).norm() / exact.norm()).item() < error


@pytest.mark.parametrize("method", CLASSES)
def test_leading_dimensions_and_number_type_are_kept(computed_by, method):
    layer = CLASSES[method](64, 20)
    layer.take("weight", random(20, 64))
    for number in (torch.float32, torch.bfloat16):
        x = random(2, 3, 64).to(number)
        assert layer(x).shape == (2, 3, 20) and layer(x).dtype == number
        torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("first", ["weight", "bias"])
def test_tensors_may_come_in_any_order(computed_by, first):
    tensors = {"weight": random(20, 64), "bias": random(20)}
    layers = []
    for order in (("weight", "bias"), (first, *(name for name in tensors if name != first))):
        layers.append(Int8Linear(64, 20))
        for name in order:
            layers[-1].take(name, tensors[name])
    x = random(4, 64, seed=9)
    assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize(("method", "largest"), [("int8", 0.02), ("int4", 1.0), ("bf16", 0.002)])
def test_kl_of_a_whole_network(computed_by, method, largest):
    """Random weights of clearly different logits; the bounds are about twice what was found."""
    net = our_network(random_model(initializer_range=0.1))
    exact, found = logits(net, prompts()).log_softmax(-1), logits(quantised(net, method), prompts()).log_softmax(-1)
    kl = (exact.exp() * (exact - found)).sum(-1).mean().item()
    assert 0 < kl < largest


@pytest.mark.parametrize("method", CLASSES)
def test_a_batch_gives_each_what_it_would_get_alone(method):
    if not kernels.level():
        pytest.skip("torch's own products depend on the batch in the last bits")
    net = quantised(our_network(random_model()), method)
    together = logits(net, prompts())
    alone = torch.cat([logits(net, [ids]) for ids in prompts()])
    # Not bit by bit: torch's attention and activations, between the layers, may round differently.
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-2 if method != "bf16" else 1e-4)


def test_all_linears_are_replaced_and_nothing_else():
    with torch.device("meta"):
        net = GPTNeoX(random_model().config)
    names = {name for name, parameter in net.named_parameters() if is_linear(name, parameter.shape)}
    linears = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    assert names == linears and "embed_out.weight" in names
    replace_linears(net, "int8")
    assert {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, Int8Linear)} == linears
    assert not any(isinstance(module, nn.Linear) for module in net.modules())


def test_names():
    assert parse_quantize(None) is None and parse_quantize("none") is None and parse_quantize("int8") == "int8"
    with pytest.raises(SettingError, match=r"'int9'. Did you mean 'int8'\? Allowed: int4, int8, int8-dynamic, none"):
        parse_quantize("int9")
