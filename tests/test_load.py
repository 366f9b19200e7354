"""Loading weights onto devices."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from modelscope_dolly import hardware
from modelscope_dolly import load as loading
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.checkpoint.reader import Checkpoint, open_checkpoint
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.errors import HardwareError, SettingError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.kernels.quantized_linear import is_linear
from modelscope_dolly.load import Dolly, load
from tests.support.layouts import plain_hf
from tests.support.models import random_model
from train.nano import build_tokenizer

GREEDY = GenerationSettings().updated({"do_sample": False, "max_new_tokens": 16})


def answers(model: Dolly) -> list[str]:
    prompts = [Prompt("Name a colour."), Prompt("Why is the sky blue?")]
    return [updates[0].text for updates in model.text_generator.generate(prompts, GREEDY, slots=2)]


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
    monkeypatch.setattr("modelscope_dolly.placement.free_memory", lambda device=None: 1000)
    monkeypatch.setattr(Checkpoint, "read_tensors", lambda self: pytest.fail("weights were read"))
    checkpoint = open_checkpoint(checkpoint_dir)
    with pytest.raises(HardwareError, match=r"the weights need .* on cpu in float32, 0\.00 GB are free"):
        loading.load_network(checkpoint, torch.float32, {"": torch.device("cpu")})


def test_a_draft_is_loaded_in_the_same_type_and_changes_no_answer(checkpoint_dir, caplog):
    expected = answers(load(checkpoint_dir, device="cpu", dtype="fp32"))
    with caplog.at_level(logging.INFO, logger="modelscope.dolly"):
        model = load(checkpoint_dir, device="cpu", dtype="fp32", draft=checkpoint_dir)
    draft = model.text_generator.engine.speculation.keywords["draft"]
    assert f"draft from {checkpoint_dir}" in caplog.text
    assert {parameter.dtype for parameter in draft.net.parameters()} == {torch.float32}
    assert draft.net is not model.net
    assert answers(model) == expected


def test_a_draft_with_another_vocabulary_is_refused_in_one_line(checkpoint_dir, records, tmp_path):
    for vocabulary, says in ((1024, "other tokens"), (900, "900 tokens instead of 1024")):
        other = build_tokenizer(records[40:] if vocabulary == 1024 else records, vocabulary)
        target = export_checkpoint(random_model(vocab_size=vocabulary), other, tmp_path / str(vocabulary))
        with pytest.raises(SettingError, match=f"another vocabulary than .*{says}.*dolly-v2-3b for") as caught:
            load(checkpoint_dir, device="cpu", draft=target)
        assert "\n" not in str(caught.value)


def test_memory_for_draft_and_network_must_be_there_together(checkpoint_dir, monkeypatch):
    """The draft is loaded first: what it takes is gone when the network's need is compared."""
    need = 4 * open_checkpoint(checkpoint_dir).parameters
    asked = []

    def free(device=None):
        asked.append(device)
        return int(1.5 * need) - (len(asked) - 1) * need

    monkeypatch.setattr("modelscope_dolly.placement.free_memory", free)
    with pytest.raises(HardwareError, match="the weights need"):
        load(checkpoint_dir, device="cpu", dtype="fp32", draft=checkpoint_dir)
    assert len(asked) == 2


def test_float32_is_chosen_where_network_and_draft_fit_together(checkpoint_dir, monkeypatch):
    checkpoint, cpu = open_checkpoint(checkpoint_dir), torch.device("cpu")
    need = loading.held_bytes(checkpoint, torch.float32, cpu)[0]
    for free, alone, together in ((2.1 * need, "float32", "bfloat16"), (2.6 * need, "float32", "float32")):
        monkeypatch.setattr(hardware, "free_memory", lambda device=None, free=free: int(free))
        assert str(loading.choose_number_type(checkpoint, cpu).value) == f"torch.{alone}"
        assert str(loading.choose_number_type(checkpoint, cpu, draft=checkpoint).value) == f"torch.{together}"


@pytest.fixture(scope="module")
def stored_in_bf16(tmp_path_factory, tokenizer):
    target = tmp_path_factory.mktemp("bf16") / "dolly"
    return export_checkpoint(random_model(vocab_size=len(tokenizer.tokenizer)).bfloat16(), tokenizer, target)


@pytest.mark.parametrize(("level", "dtype"), [(2, torch.float32), (0, torch.bfloat16)])
def test_float32_is_taken_where_its_packed_weights_fit(level, dtype, stored_in_bf16, monkeypatch):
    """Memory for two bytes per linear weight and four per other one, not for four of each."""
    checkpoint = open_checkpoint(stored_in_bf16)
    linear = sum(math.prod(s) for name, s in parameter_shapes(checkpoint.config).items() if is_linear(name, s))
    packed = 2 * linear + 4 * (checkpoint.parameters - linear)
    monkeypatch.setattr(loading.cpu, "level", lambda: level)
    monkeypatch.setattr(loading, "cpu_computes_bf16", lambda: False)
    for free, expected in ((packed / 0.8 + 9, dtype), (packed / 0.8 - 9, torch.bfloat16), (1e15, torch.float32)):
        monkeypatch.setattr(hardware, "free_memory", lambda device=None, free=free: int(free))
        choice = loading.choose_number_type(checkpoint, torch.device("cpu"))
        assert choice.value == expected
        held = level > 0 and expected == torch.float32
        assert ("stay in bfloat16, as stored, and are multiplied in float32" in choice.reason) == held
    assert loading.held_bytes(checkpoint, torch.float32, torch.device("cpu"))[0] == (
        packed if level else 4 * checkpoint.parameters
    )


def test_held_bytes_are_those_of_the_loaded_network(stored_in_bf16):
    checkpoint, cpu = open_checkpoint(stored_in_bf16), torch.device("cpu")
    for dtype, quantize in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8")):
        net = loading.load_network(checkpoint, dtype, {"": cpu}, quantize)
        stored = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
        # biases of packed layers stay in float32, and int8 has scales: next to nothing, except in so small a network
        assert loading.held_bytes(checkpoint, dtype, cpu, quantize)[0] == pytest.approx(stored, rel=0.04)


class Raising:
    def _fail(self, *_):
        raise RuntimeError

    __eq__ = __str__ = __repr__ = __len__ = __bool__ = __iter__ = __fspath__ = _fail
    __hash__ = object.__hash__


STRANGE = (np.arange(2), torch.ones(2), Raising(), 10**400, 10**5000, b"auto", 0.5, ["auto"], object)


@pytest.mark.parametrize("name", ["device", "dtype", "device_map", "verify", "quantize", "threads", "draft"])
@pytest.mark.parametrize("value", STRANGE, ids=lambda value: type(value).__name__)
def test_any_value_of_any_option_is_a_setting_error_that_names_it(checkpoint_dir, name, value):
    with pytest.raises(SettingError, match=f"unknown {name} |{name} is |{name}: ") as caught:
        load(checkpoint_dir, **{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "device_map", [True, {1: "cpu"}, {"": 10**400}, {"": None}, {"": "meta"}, {"": Raising()}, "no"]
)
def test_a_device_map_that_is_none_is_refused_before_anything_is_read(device_map):
    with pytest.raises(SettingError, match=r"device_map|unknown device "):
        load("nowhere", device_map=device_map)


@pytest.mark.parametrize("path", [None, 5, Raising(), np.arange(2)])
def test_a_model_that_is_no_path_is_refused(path):
    for step in (load, locate):
        with pytest.raises(SettingError, match=r"^model is "):
            step(path)


def test_files_without_recorded_checksums_are_told_once_and_not_where_nobody_asked(
    checkpoint_dir, tmp_path, monkeypatch
):
    told, handler = [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("modelscope.dolly")
    monkeypatch.setattr(logger, "handlers", [handler])
    plain = plain_hf(checkpoint_dir, tmp_path / "plain")
    load(checkpoint_dir, device="cpu"), load(plain, device="cpu", verify=False)
    assert not [line for line in told if "checksums" in line]
    load(plain, device="cpu")
    [line] = [line for line in told if "checksums" in line]
    assert line.startswith(f"{plain}: no recorded checksums") and line.endswith(f"dolly check --write-manifest {plain}")
