"""Loading weights onto devices."""

from __future__ import annotations

import logging

import pytest
import torch

from modelscope_dolly import loading
from modelscope_dolly.checkpoint import open_checkpoint
from modelscope_dolly.errors import HardwareError, SettingError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.loading import Dolly, load

GREEDY = GenerationSettings().updated({"do_sample": False, "max_new_tokens": 16})


def answers(model: Dolly) -> list[str]:
    prompts = [Prompt("Name a colour."), Prompt("Why is the sky blue?")]
    return [updates[0].text for updates in model.responder.answers(prompts, GREEDY, slots=2)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", torch.float16])
def test_weights_are_in_the_requested_type(checkpoint_dir, dtype):
    model = load(checkpoint_dir, device="cpu", dtype=dtype)
    types = {parameter.dtype for parameter in model.net.parameters()}
    assert types == {model.dtype}
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.net.parameters())


def test_device_and_type_are_logged_with_their_reasons(checkpoint_dir, caplog):
    with caplog.at_level(logging.INFO, logger="modelscope.dolly"):
        load(checkpoint_dir, device="cpu")
    assert "device cpu (asked for)" in caplog.text and "weights in torch." in caplog.text


def test_device_map_uses_hooks_and_moves_nothing(checkpoint_dir, monkeypatch):
    expected = answers(load(checkpoint_dir, device="cpu", dtype="fp32"))
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: moved.append(self) or self)
    placement = {
        "gpt_neox.embed_in": "cpu",
        "gpt_neox.layers": "cpu",
        "gpt_neox.final_layer_norm": "cpu",
        "embed_out": "cpu",
    }
    model = load(checkpoint_dir, dtype="fp32", device_map=placement)
    assert any(hasattr(module, "_hf_hook") for module in model.net.modules())
    assert answers(model) == expected
    assert moved == []


def test_device_map_auto_on_a_machine_without_gpu_is_the_cpu(checkpoint_dir):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = load(checkpoint_dir, dtype="fp32", device_map="auto")
    assert model.device == torch.device("cpu") and all(answers(model))


@pytest.mark.parametrize(
    ("placement", "error", "says"),
    [
        ("balanced", SettingError, "unknown device_map 'balanced'"),
        ({"": "disk"}, HardwareError, "does not fit"),
        ({"gpt_neox": "cpu"}, SettingError, "no device for embed_out"),
    ],
)
def test_bad_device_map_is_refused(checkpoint_dir, placement, error, says):
    with pytest.raises(error, match=says):
        load(checkpoint_dir, device_map=placement)


def test_too_little_memory_is_said_before_anything_is_read(checkpoint_dir, monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda device=None: 1000)
    monkeypatch.setattr(loading, "read_tensors", lambda places: pytest.fail("weights were read"))
    checkpoint = open_checkpoint(checkpoint_dir)
    with pytest.raises(HardwareError, match=r"the weights need .* on cpu in float32, 0\.00 GB are free"):
        loading.load_network(checkpoint, torch.float32, {"": torch.device("cpu")})
