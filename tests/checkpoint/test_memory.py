"""Memory by arithmetic, against that of loaded models."""

from __future__ import annotations

import pytest
import torch

from modelscope_dolly.checkpoint import memory
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.load import load_network


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_figures_equal_what_a_loaded_model_takes(checkpoint_dir, name, dtype, monkeypatch):
    checkpoint = open_checkpoint(checkpoint_dir)
    net = load_network(checkpoint, dtype, {"": torch.device("cpu")})
    [need] = [row for row in memory.memory_needs(checkpoint.config) if row.format == name]
    tensors = [*net.parameters(), *net.buffers()]
    # Layers packed for our kernels keep their biases in float32: next to nothing, except in so small a network.
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(need.weights, rel=0.02)
    caches = []
    new_cache = net.new_cache
    monkeypatch.setattr(net, "new_cache", lambda *sizes: caches.append(new_cache(*sizes)) or caches[-1])
    window = checkpoint.config.max_position_embeddings
    engine = Engine(net, torch.device("cpu"), window)
    run = engine.run([Request([5], window - 1)])
    next(run)
    stored = sum(t.numel() * t.element_size() for pair in caches[0]._layers.values() for t in pair)
    run.close()
    assert need.cache == stored == net.cache_bytes * window


def test_only_linear_weights_are_held_in_fewer_bytes():
    rows = {row.format: row for row in memory.memory_needs(memory.shape_config("7b"))}
    # 50,280 embeddings of 4096, and the norms and biases of 32 layers
    rest = (4 * rows["fp32"].weights / 4 - 2 * (rows["fp32"].weights - rows["fp32/bf16"].weights)) / 4
    assert rest == pytest.approx(50280 * 4096, rel=0.01)
    assert rows["fp32/bf16"].cache == rows["fp32"].cache == 2 * rows["bf16"].cache == 2 * rows["int8"].cache
    linear = rows["fp32"].weights / 4 - rest
    assert rows["int8"].weights == pytest.approx(linear + 4 * rest, rel=1e-6)
