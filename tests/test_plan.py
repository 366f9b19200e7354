"""dolly plan: memory by arithmetic."""

from __future__ import annotations

import pytest
import torch

from modelscope_dolly import plan as plan_module
from modelscope_dolly.checkpoint import open_checkpoint
from modelscope_dolly.engine import Engine, Request
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.loading import load_network


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


def test_quantised_formats_are_offered_on_the_cpu_alone(checkpoint_dir, monkeypatch):
    monkeypatch.setattr(plan_module, "places", lambda: {"cpu": 10**12, "cuda:0": 10**12})
    fits = {row["format"]: row["fits"] for row in plan_module.plan(str(checkpoint_dir))["formats"]}
    assert fits["bf16"] == ["cpu", "cuda:0"] and fits["int8"] == fits["int4"] == ["cpu"]


def test_unknown_model_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        plan_module.plan(str(tmp_path / "nothing"))
