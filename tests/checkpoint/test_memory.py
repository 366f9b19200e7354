"""dolly plan: memory by arithmetic."""

from __future__ import annotations

import json

import pytest
import torch

from modelscope_dolly.checkpoint import memory as plan_module
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.load import load_network


def test_published_sizes_have_the_published_number_of_weights():
    # Counted from the configurations at a vocabulary of 50,280.
    for size, billions in (("3b", 2.775), ("7b", 6.856), ("12b", 11.842)):
        assert plan_module.plan(size)["parameters"] == pytest.approx(billions * 1e9, rel=2e-4)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_figures_equal_what_a_loaded_model_takes(checkpoint_dir, name, dtype, monkeypatch):
    checkpoint = open_checkpoint(checkpoint_dir)
    net = load_network(checkpoint, dtype, {"": torch.device("cpu")})
    [need] = [row for row in plan_module.needs(checkpoint.config) if row.format == name]
    tensors = [*net.parameters(), *net.buffers()]
    # Layers packed for our kernels keep their biases in float32: next to nothing, except in so small a network.
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(need.weights, rel=0.02)
    caches = []
    original = Engine._forward
    monkeypatch.setattr(
        Engine, "_forward", lambda self, ids, step, cache: caches.append(cache) or original(self, ids, step, cache)
    )
    window = checkpoint.config.max_position_embeddings
    engine = Engine(net, torch.device("cpu"), window)
    run = engine.run([Request([5], window - 1)])
    next(run)
    run.close()
    stored = sum(t.numel() * t.element_size() for pair in caches[0]._layers.values() for t in pair)
    assert need.cache == stored


def test_places_that_are_too_small_are_left_out(monkeypatch):
    monkeypatch.setattr(plan_module, "places", lambda: {"cpu": 30 * 10**9, "cuda:0": 8 * 10**9})
    figures = plan_module.plan("12b")
    fits = {row["format"]: row["fits"] for row in figures["formats"]}
    assert fits["fp32"] == [] and fits["bf16"] == ["cpu"] and fits["int8"] == ["cpu"]
    text = plan_module.report(figures)
    assert "nothing here" in text and "11.842 billion weights" in text


@pytest.mark.parametrize("level", [0, 2])
def test_weights_held_in_bf16_are_offered_where_the_cpu_computes_them(level, checkpoint_dir, monkeypatch):
    monkeypatch.setattr(plan_module, "places", lambda: {"cpu": 10**12, "cuda:0": 10**12})
    monkeypatch.setattr(plan_module.kernels, "level", lambda: level)
    rows = {row["format"]: row for row in plan_module.plan("7b")["formats"]}
    for name in ("fp32", "bf16", "int8", "int4"):
        assert rows[name]["fits"] == ["cpu", "cuda:0"]
    assert ("fp32/bf16" in rows) == (level > 0)
    if level:
        assert rows["fp32/bf16"]["fits"] == ["cpu"]
        assert "float32 computes" in plan_module.report(plan_module.plan("7b"))
    # a checkpoint that is stored in float32 keeps it
    assert "fp32/bf16" not in {row["format"] for row in plan_module.plan(str(checkpoint_dir))["formats"]}


def test_config_json_says_how_weights_are_stored_in_the_old_spelling_too(checkpoint_dir, tmp_path):
    for spelling, expected in (({"torch_dtype": "bfloat16"}, True), ({"dtype": "float16"}, False), ({}, False)):
        raw = json.loads((checkpoint_dir / "config.json").read_text())
        raw = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")} | spelling
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert plan_module.model_config(str(tmp_path))[1] == expected


def test_only_linear_weights_are_held_in_fewer_bytes(monkeypatch):
    for computes, other in ((False, 4), (True, 2)):
        monkeypatch.setattr(plan_module, "cpu_computes_bf16", lambda computes=computes: computes)
        rows = {row.format: row for row in plan_module.needs(plan_module.shape_config("7b"))}
        # 50,280 embeddings of 4096, and the norms and biases of 32 layers
        rest = (4 * rows["fp32"].weights / 4 - 2 * (rows["fp32"].weights - rows["fp32/bf16"].weights)) / 4
        assert rest == pytest.approx(50280 * 4096, rel=0.01)
        assert rows["fp32/bf16"].cache == rows["fp32"].cache == 2 * rows["bf16"].cache
        linear = rows["fp32"].weights / 4 - rest
        assert rows["int8"].weights == pytest.approx(linear + other * rest, rel=1e-6)


def test_unknown_model_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        plan_module.plan(str(tmp_path / "nothing"))
