"""The compiled attention over the cache, against its definition in float64, and in the network against torch's."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.kernels import cpu as kernels
from tests.support.models import our_network, quantised, random_model

pytestmark = pytest.mark.skipif(
    not kernels.level(), reason="no compiler built the library, or it knows nothing of this processor"
)

LEVELS = [level for level in (1, 2) if level <= kernels.level()]
F32, BF16 = torch.float32, torch.bfloat16
#: heads, width, rotated: dolly's (80 in the 3b, 128 in the others), all and nothing rotated, widths in several pieces.
SHAPES = [(32, 80, 20), (3, 128, 32), (4, 16, 4), (1, 64, 64), (2, 144, 0), (2, 272, 68)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Tokens:
    """Arguments of kernels.attend."""

    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, level: int | None = None) -> torch.Tensor:
        """Into a copy of the cache, which is kept."""
        self.written = self.keys.clone(), self.values.clone()
        return kernels.attend(self.qkv, self.cos, self.sin, self.slots, self.positions, *self.written, level)

    def rows(self, begin: int, end: int) -> Tokens:
        parts = (getattr(self, name)[begin:end] for name in ("qkv", "cos", "sin", "slots", "positions"))
        return Tokens(*parts, self.keys, self.values)


def tokens(shape, places: list[tuple[int, int]], slots: int = 4, length: int = 40, dtype=F32, cache=F32) -> Tokens:
    """Random tokens at (slot, position), and a cache whose unwritten places are spoilt."""
    heads, width, rotated = shape
    count, where = len(places), torch.tensor(places)
    angles = random(count, rotated // 2, seed=1) * 3
    cos, sin = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)
    keys, values = (random(slots, heads, length, width, seed=seed).to(cache) for seed in (2, 3))
    for slot, position in places:  # all that any token of the slot may look at stays, its own place does not
        keys[slot, :, position] = values[slot, :, position] = float("nan")
        behind = max(p for s, p in places if s == slot)
        keys[slot, :, behind:] = values[slot, :, behind:] = float("nan")
    qkv = random(count, heads, 3, width, seed=4).to(dtype)
    return Tokens(qkv, cos[:, None, None], sin[:, None, None], *where.unbind(1), keys, values)


def contiguous(made: Tokens) -> Tokens:
    made.slots, made.positions = made.slots.contiguous(), made.positions.contiguous()
    return made


def definition(made: Tokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Result, keys and values in float64; what is written is rounded to the number type of the cache."""
    rotated = made.cos.shape[-1]
    query, key, value = (part.double() for part in made.qkv.unbind(2))
    for part in (query, key):
        turned = part[..., :rotated].clone()
        swapped = turned.roll(rotated // 2, -1)
        part[..., :rotated] = turned * made.cos[:, 0].double() + swapped * made.sin[:, 0].double()
    keys, values = made.keys.clone(), made.values.clone()
    keys[made.slots, :, made.positions] = key.float().to(keys.dtype)
    values[made.slots, :, made.positions] = value.to(values.dtype)
    rows = []
    for one, slot, position in zip(query, made.slots.tolist(), made.positions.tolist(), strict=True):
        seen, qkv = (cache[slot, :, : position + 1].double() for cache in (keys, values))
        weights = (torch.einsum("hd,hld->hl", one, seen) / math.sqrt(one.shape[1])).softmax(-1)
        rows.append(torch.einsum("hl,hld->hd", weights, qkv).flatten())
    return torch.stack(rows), keys, values


DECODE = [(0, 17), (1, 0), (2, 39), (3, 15)]
EXTEND = [(0, 3), (0, 4), (0, 5), (2, 30), (3, 0), (3, 1)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("places", [DECODE, EXTEND, [(1, 31)]], ids=["decode", "extend", "one"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_definition(shape, places, level):
    made = contiguous(tokens(shape, places))
    expected, keys, values = definition(made)
    out = made.attend(level)
    assert out.shape == (len(places), shape[0] * shape[1]) and out.isfinite().all()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(made.written[0], keys, rtol=0, atol=1e-6, equal_nan=True)
    assert torch.equal(made.written[1].nan_to_num(9.0), values.nan_to_num(9.0))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cache", [F32, BF16])
def test_number_types(dtype, cache, level):
    made = contiguous(tokens((4, 80, 20), EXTEND, dtype=dtype, cache=cache))
    expected, keys, values = definition(made)
    out = made.attend(level)
    assert out.dtype == dtype and made.written[0].dtype == cache
    # A rotated key halfway between two bfloat16 numbers may go either way, once in a while.
    assert (made.written[0].nan_to_num(9.0) != keys.nan_to_num(9.0)).float().mean() < (0.001 if cache == BF16 else 1)
    torch.testing.assert_close(made.written[0], keys, rtol=2**-7, atol=1e-6, equal_nan=True)
    assert torch.equal(made.written[1].nan_to_num(9.0), values.nan_to_num(9.0))
    near = {F32: 2e-6 if cache == F32 else 1e-3, BF16: 2**-8}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=near, atol=near)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 64, 65, 200])
def test_every_length(length):
    made = contiguous(tokens((2, 32, 8), [(0, length - 1), (1, length // 2)], slots=2, length=length))
    for level in LEVELS:
        torch.testing.assert_close(made.attend(level).double(), definition(made)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("cache", [F32, BF16])
def test_depends_neither_on_neighbours_nor_on_threads_nor_on_the_instruction_set(cache):
    made = contiguous(tokens((5, 80, 20), DECODE, cache=cache))
    expected = made.attend()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for level in LEVELS:
                assert torch.equal(made.attend(level), expected)
                alone = [made.rows(row, row + 1).attend(level) for row in range(len(DECODE))]
                assert torch.equal(torch.cat(alone), expected)
    finally:
        torch.set_num_threads(before)


def test_several_tokens_of_a_slot_at_once_are_those_one_after_the_other():
    made = contiguous(tokens((4, 80, 20), [(1, position) for position in range(6, 19)]))
    together, kept = made.attend(), None
    for row in range(13):
        one = made.rows(row, row + 1)
        one.keys, one.values = kept or (made.keys, made.values)
        assert torch.equal(one.attend()[0], together[row])
        kept = one.written
    assert all(torch.equal(mine.nan_to_num(9.0), theirs.nan_to_num(9.0))
               for mine, theirs in zip(kept, made.written, strict=True))  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_scores_of_any_size(level):
    """Far apart, so that one place takes all; equal; and too small to be told from 0."""
    for scale in (1e4, 0.0, 1e-30):
        made = contiguous(tokens((2, 16, 4), DECODE))
        made.qkv[:, :, 0] *= scale
        torch.testing.assert_close(made.attend(level).double(), definition(made)[0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden_and_spoils_its_own_row(bad, part, level):
    made = contiguous(tokens((2, 32, 8), DECODE))
    good = made.attend(level)
    made.qkv[1, 0, part, 5] = bad
    out = made.attend(level)
    assert not out[1, :32].isfinite().all()
    assert torch.equal(out[1, 32:], good[1, 32:]) and torch.equal(out[[0, 2, 3]], good[[0, 2, 3]])


@pytest.mark.parametrize("place", [(-1, 0), (4, 0), (0, -1), (0, 40), (2**40, 0)])
def test_a_place_outside_the_cache_is_an_error_before_anything_is_written(place):
    made = contiguous(tokens((2, 16, 4), DECODE))
    made.slots[2], made.positions[2] = place
    with pytest.raises(IndexError, match="outside a cache of 4 slots of 40 places"):
        made.attend()
    assert torch.equal(made.written[0].nan_to_num(9.0), made.keys.nan_to_num(9.0))


def test_memory_of_the_wrong_size_or_type_never_reaches_the_library():
    def changed(**parts) -> Tokens:
        made = contiguous(tokens((2, 16, 4), DECODE))
        for name, change in parts.items():
            setattr(made, name, change(getattr(made, name)))
        return made

    short = slice(0, 3)
    wrong = [
        changed(qkv=lambda t: t.double()),
        changed(qkv=lambda t: t[..., :8].contiguous()),
        changed(qkv=lambda t: t[:, :, :2].contiguous()),
        changed(qkv=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
        changed(cos=lambda t: t.double()),
        changed(cos=lambda t: t[short]),
        changed(sin=lambda t: t[..., :2].contiguous()),
        changed(cos=lambda t: t.repeat(1, 1, 1, 5), sin=lambda t: t.repeat(1, 1, 1, 5)),
        changed(slots=lambda t: t[short]),
        changed(slots=lambda t: t.int()),
        changed(positions=lambda t: t[short]),
        changed(positions=lambda t: torch.stack([t, t], dim=1)[:, 0]),
        changed(keys=lambda t: t.half(), values=lambda t: t.half()),
        changed(keys=lambda t: t.bfloat16()),
        changed(values=lambda t: t[:, :, :39].contiguous()),
        changed(keys=lambda t: t[:, :1].contiguous(), values=lambda t: t[:, :1].contiguous()),
        changed(keys=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    ]
    for made in wrong:
        with pytest.raises(ValueError, match="do not fit each other"):
            made.attend()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cache", ["float32", "bfloat16"])
def test_nothing_behind_the_cache_is_read_or_written(cache, level):
    """The cache ends where memory does: the page behind it may not be touched."""
    code = f"""
import ctypes, mmap, torch
from modelscope_dolly.kernels import cpu as kernels
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def at_the_end(shape, dtype):
    size = torch.empty(shape, dtype=dtype).nbytes
    pages = -(-size // page) + 1
    memory = mmap.mmap(-1, pages * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert libc.mprotect(place + (pages - 1) * page, page, 0) == 0
    count = size // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=(pages - 1) * page - size).view(shape)
for length in range(1, 20):
    keys, values = (at_the_end((1, 2, length, 16), torch.{cache}) for _ in range(2))
    table, last = torch.ones(1, 4), torch.tensor([length - 1])
    out = kernels.attend(torch.ones(1, 2, 3, 16), table, table, last * 0, last, keys, values, {level})
    assert out.isfinite().all()
print("untouched")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "untouched", (done.returncode, done.stderr)


@pytest.mark.parametrize("level", LEVELS)
def test_a_nan_of_any_bits_stays_one_in_bfloat16(level):
    """Rounding must not carry over from all bits set into the sign."""
    made = contiguous(tokens((2, 16, 4), [(1, 3)], dtype=F32, cache=BF16))
    made.qkv.view(torch.int32)[0, 1, 2, 7] = 0x7FFFFFFF
    assert made.attend(level)[0, 16 + 7].isnan() and made.written[1][1, 1, 3, 7].isnan()


@pytest.mark.parametrize(
    ("device", "dtype", "width", "rotated"),
    [("meta", F32, 16, 4), ("cpu", torch.float16, 16, 4), ("cpu", F32, 24, 6), ("cpu", F32, 16, 3)],
)
def test_what_is_left_to_torch(device, dtype, width, rotated):
    assert kernels.attends(torch.device("cpu"), F32, 16, 4)
    assert not kernels.attends(torch.device(device), dtype, width, rotated)


# ------------------------------------------------------------------ in the network


@torch.inference_mode()
def steps(net: GPTNeoX) -> tuple[torch.Tensor, KVCache]:
    """Logits of decode and extend steps over three sequences of unequal length."""
    generator, cache = torch.Generator().manual_seed(5), net.new_cache(3, 64)
    lengths = [9, 1, 14]
    ids = torch.randint(0, 1024, (200,), generator=generator)
    net(ids[:24], StepInput.prefill(lengths), cache)
    found = [net(ids[30:33], StepInput.decode(lengths), cache)]
    found.append(net(ids[40:48], StepInput.verify([(0, 10, 3), (1, 2, 1), (2, 15, 4)]), cache))
    found.append(net(ids[50:51], StepInput.verify([(1, 3, 1)], last_only=True), cache))
    found.append(net(ids[60:62], StepInput.decode([13, 4]), cache))
    return torch.cat(found), cache


@pytest.mark.parametrize(
    "changes",
    [{}, {"rotary_pct": 1.0}, {"num_attention_heads": 1}, {"attention_bias": False}, {"hidden_size": 96}],
    ids=["dolly", "rotary all", "one head", "no bias", "heads of 24"],
)
def test_logits_are_those_of_torchs_attention(changes, monkeypatch):
    net = our_network(random_model(**changes))
    calls, attend = [], kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *arguments: calls.append(1) or attend(*arguments))
    found, cache = steps(net)
    assert len(calls) == (0 if "hidden_size" in changes else 4 * 3)
    monkeypatch.setattr(kernels, "_library", lambda: None)
    expected, other = steps(net)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    for mine, theirs in zip(cache._layers[2], other._layers[2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_angles_stay_in_float32_whatever_the_number_type(monkeypatch):
    net, tables = our_network(random_model(num_hidden_layers=1)).to(BF16), []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda qkv, *others: tables.append(others[0]) or attend(qkv, *others))
    with torch.inference_mode():
        net(torch.tensor([5]), StepInput.decode([2000]), net.new_cache(1, 2048))
    [cos] = tables
    rotary = net.gpt_neox.layers[0].attention.rotary
    assert cos.dtype == F32 and torch.equal(cos, rotary(torch.tensor([2000]), F32)[0])


def test_bfloat16_is_as_close_to_float32_as_with_torchs_attention(monkeypatch):
    model = random_model()
    exact, half = steps(our_network(model))[0], our_network(model).to(BF16)
    mine = steps(half)[0]
    monkeypatch.setattr(kernels, "_library", lambda: None)
    theirs = steps(half)[0]
    my_error, their_error = ((found.float() - exact).square().mean().sqrt() for found in (mine, theirs))
    assert mine.dtype == BF16 and 0 < my_error < 1.2 * their_error


@pytest.mark.parametrize(("method", "dtype"), [(None, F32), ("bf16", F32), ("int8", BF16), ("int4", BF16)])
def test_the_cache_is_in_bfloat16_where_linear_layers_are_quantised(method, dtype, monkeypatch):
    net = our_network(random_model())
    assert all(
        part.dtype == dtype
        for layer in steps(quantised(net, method) if method else net)[1]._layers.values()
        for part in layer
    )
    monkeypatch.setattr(kernels, "_library", lambda: None)
    assert steps(quantised(net, method) if method else net)[1]._layers[0][0].dtype == F32


def test_rounding_the_cache_is_small_beside_quantisation():
    """Each alone: with both, a change too small to matter moves some activations from one int8 number to the next."""
    net = our_network(random_model(initializer_range=0.1))
    exact, eighth = steps(net)[0].log_softmax(-1), quantised(net, "int8")
    eighth.cache_dtype, net.cache_dtype = F32, BF16
    by_layers = steps(eighth)[0].log_softmax(-1)
    by_cache = steps(net)[0].log_softmax(-1)
    layers, cache = ((exact.exp() * (exact - found)).sum(-1).mean().item() for found in (by_layers, by_cache))
    assert 0 < cache < 0.1 * layers, (cache, layers)
