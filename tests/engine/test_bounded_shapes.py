"""Few shapes reach torch's CPU library whatever is asked, and what fills them up changes no answer."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelscope_dolly.engine.bounded_shapes import bounded, fill_up, in_pieces
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.load import load
from tests.support.models import our_network, random_model

#: What oneDNN may compute. Attention is `_scaled_dot_product_flash_attention_for_cpu`.
KEEPS_CODE = ("addmm", "mm", "linear", "bmm", "gelu", "scaled_dot_product", "mkldnn")


class Shapes(TorchDispatchMode):
    """Records the shapes of what is computed by the operations that keep code for each."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, set] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if any(part in name for part in KEEPS_CODE):
            shapes = tuple(tuple(value.shape) for value in args if isinstance(value, torch.Tensor))
            self.seen.setdefault(name, set()).add(shapes)
        return operation(*args, **(kwargs or {}))


def test_bounded_numbers_are_few_and_near():
    values = [bounded(count) for count in range(1, 2049)]
    assert all(count <= value <= 1.125 * count for count, value in enumerate(values, 1))
    assert values == sorted(values) and len(set(values)) == 72
    assert [bounded(value) for value in values] == values


def test_zeros_fill_up():
    filled = fill_up(torch.ones(1, 2, 3), 5, 1)
    assert filled.shape == (1, 5, 3) and filled.sum() == 6 and not filled[:, 2:].any()
    assert fill_up(filled, 5, 1) is filled


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_requests_of_many_lengths_compute_few_shapes(checkpoint_dir, dtype, monkeypatch):
    """As on a CPU that computes the type itself, with and without the compiled kernels."""
    monkeypatch.setattr("modelscope_dolly.load.cpu_computes_bf16", lambda: True)
    net = load(checkpoint_dir, device="cpu", dtype=dtype).net
    lengths, slots = range(65, 129, 2), range(1, 33)
    with Shapes() as shapes, torch.inference_mode():
        for length in lengths:
            cache = net.new_cache(1, 512)
            chunks = [(0, 0, length, 1)] if length % 4 == 1 else [(0, 0, 256, 1), (0, 256, 256 + length, 1)]
            for chunk in chunks:
                net(torch.zeros(chunk[2] - chunk[1], dtype=torch.long), StepInput.chunks([chunk]), cache)
        for count in slots:
            net(torch.zeros(count, dtype=torch.long), StepInput.decode([5] * count), net.new_cache(count, 64))
    allowed = {256, *map(bounded, lengths), *map(bounded, slots)}
    assert {shape[0] for [shape, *_] in shapes.seen.pop("gelu")} == {1 << bit for bit in range(9)}
    rows = {matrix[-2] for seen in shapes.seen.values() for shape in seen for matrix in shape if len(matrix) == 2}
    assert rows >= allowed and len({*lengths, *slots}) > 1.8 * len(allowed)
    for name, seen in shapes.seen.items():
        if "scaled_dot" not in name:
            assert len(seen) <= 5 * len(allowed), name  # four layers of a block, and the head
    attention = [seen for name, seen in shapes.seen.items() if "scaled_dot" in name]
    assert attention and (dtype == "fp32" or all(len(seen) <= len(allowed) for seen in attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filled_up_rows_change_nothing(dtype):
    """Against the same network without: prompts end to end, chunks, decode steps, several tokens of a slot."""
    plain, filled = (our_network(random_model()).to(dtype) for _ in range(2))
    filled.bounds_shapes = True
    caches = KVCache(3, 512), KVCache(3, 512)
    tokens = torch.randint(0, 1024, (400,), generator=torch.Generator().manual_seed(1))
    steps = [
        (tokens[:91], StepInput.prefill([37, 33, 21])), (tokens[:150], StepInput.chunks([(0, 37, 187, 1)])),
        (tokens[:3], StepInput.decode([187, 33, 21])), (tokens[:19], StepInput.verify([(0, 188, 17), (1, 34, 2)])),
        (tokens[:19], StepInput.verify([(0, 188, 17), (1, 34, 2)], last_only=True)),
    ]  # fmt: skip
    with torch.inference_mode():
        for ids, step in steps:
            expected, found = (net(ids, step, cache) for net, cache in zip((plain, filled), caches, strict=True))
            assert found.shape == expected.shape
            spread = expected.float().std()
            assert (found.float() - expected.float()).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * spread


def test_pieces_make_the_whole():
    wide = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    sizes = []
    assert torch.equal(in_pieces(lambda piece: sizes.append(len(piece)) or piece * 2, wide), wide * 2)
    assert sizes == [256, 32, 8, 4]


def test_own_kernels_need_no_filling_up(checkpoint_dir):
    model = load(checkpoint_dir, device="cpu", quantize="int8")
    from modelscope_dolly.kernels import cpu

    assert model.net.bounds_shapes == (cpu.level() == 0)


def test_an_answer_in_bf16_does_not_depend_on_its_neighbours(checkpoint_dir, monkeypatch):
    monkeypatch.setattr("modelscope_dolly.load.cpu_computes_bf16", lambda: True)
    generator = load(checkpoint_dir, device="cpu", dtype="bf16").text_generator
    settings = GenerationSettings(max_new_tokens=12, do_sample=False)
    prompts = [Prompt("Go on. " * count) for count in (1, 9, 40, 3, 70)]
    alone = [generator.generate([prompt], settings, 1)[0][0].text for prompt in prompts]
    assert [updates[0].text for updates in generator.generate(prompts, settings, 5)] == alone
