"""The kernels of a decode step, against torch and float64. What the compiler makes of them: test_triton_compiled.py.

Without a CUDA device Triton's interpreter runs them: see triton_interpreter.py for what it does otherwise than a GPU.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from modelscope_dolly.engine.gpt_neox import Attention
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.rotary import Rotary
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.kernels import cpu as kernels
from modelscope_dolly.kernels import quantized_linear as quantize
from modelscope_dolly.kernels import triton_decode as triton_kernels
from tests.support.models import tiny_config

triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA on Linux")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["plain", "int8", "int4"]
#: Largest error of rounding a result once.
ONCE = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
#: What sums in float32 may be off by, as a share of the sum of sizes.
SUMMED = 2e-6


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(found: torch.Tensor, exact: torch.Tensor, sizes: torch.Tensor | float) -> None:
    """found is exact (float64) but for float32 sums over terms of these sizes and one rounding to its type."""
    bound = ONCE[found.dtype] * exact.abs() + SUMMED * sizes
    if found.dtype == torch.float16:
        bound += 2**-25  # its smallest steps
    assert torch.isfinite(found).all()
    assert ((found.double() - exact).abs() <= bound).all(), float(((found.double() - exact).abs() / bound).max())


def weights(outputs: int, inputs: int, kind: str, dtype: torch.dtype, seed: int = 1):
    """(weight, scales) as `linear` takes them, and what they stand for in float64 [N, K]."""
    weight = random(outputs, inputs, seed=seed) / inputs**0.5
    if kind == "plain":
        return (weight.to(dtype), None), weight.to(dtype).double()
    stored = quantize.stored_tensors("w", weight.cpu(), kind, quantize.ROWS)
    whole, scales = quantize.quantise_int8(weight.cpu()) if kind == "int8" else quantize.quantise_int4(weight.cpu())
    steps = scales[:, None] if kind == "int8" else scales.repeat_interleave(kernels.GROUP, dim=1)[:, :inputs]
    packed = (stored[f"w_{kind}"].to(DEVICE), stored["w_scale"].to(DEVICE))
    return packed, (whole.double() * steps.double()).to(DEVICE)


def check_linear(rows: int, inputs: int, outputs: int, kind: str, dtype: torch.dtype, **options) -> None:
    (weight, scales), meant = weights(outputs, inputs, kind, dtype)
    x = random(rows, inputs, dtype=dtype)
    bias = random(outputs, seed=2, dtype=options["bias"]) if options.get("bias") else None
    residual = random(rows, outputs, seed=3, dtype=dtype) if options.get("residual") else None
    gelu = options.get("gelu", False)
    found = triton_kernels.linear(x, weight, scales, bias, gelu=gelu, residual=residual)
    exact, sizes = x.double() @ meant.T, x.double().abs() @ meant.abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    if gelu:
        exact = F.gelu(exact)
    if residual is not None:
        exact, sizes = exact + residual.double(), sizes + residual.double().abs()
    assert found.dtype == dtype and found.shape == (rows, outputs)
    near(found, exact, sizes)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_exact_but_for_one_rounding(kind, dtype):
    check_linear(3, 1024, 50, kind, dtype, bias=torch.float32, gelu=True, residual=True)
    check_linear(2, 512, 40, kind, dtype)
    check_linear(20, 512, 33, kind, dtype, bias=dtype, residual=True)
    check_linear(1, 1, 1, kind, dtype, gelu=True)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, triton_kernels.LARGEST_M), st.integers(1, 700), st.integers(1, 70), st.sampled_from(KINDS),
    st.sampled_from(TYPES), st.sampled_from([None, *TYPES]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_linear_of_any_size(rows, inputs, outputs, kind, dtype, bias, gelu, residual):
    bias = bias if bias in (None, dtype, torch.float32) else None
    check_linear(rows, inputs, outputs, kind, dtype, bias=bias, gelu=gelu, residual=residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_is_no_less_exact_than_torch_in_the_same_type(dtype):
    """torch rounds after each of product, GELU and addition; here once. Root mean square, 128 x 16 results."""
    (weight, _), meant = weights(128, 1024, "plain", dtype)
    x, bias, residual = random(16, 1024, dtype=dtype), random(128, dtype=dtype), random(16, 128, seed=3, dtype=dtype)
    exact = F.gelu(x.double() @ meant.T + bias.double()) + residual.double()
    usual = F.gelu(F.linear(x, weight, bias)) + residual
    found = triton_kernels.linear(x, weight, None, bias, gelu=True, residual=residual)
    assert (found.double() - exact).norm() <= (usual.double() - exact).norm()


@pytest.mark.parametrize(("kind", "layer"), [("int8", quantize.Int8Linear), ("int4", quantize.Int4Linear)])
@pytest.mark.parametrize("inputs", [512, 130, 77])
def test_linear_reads_what_a_quantised_layer_holds(monkeypatch, kind, layer, inputs):
    """The layer as it lies on a GPU or without the compiled library: numbers as stored, multiplied in float32."""
    monkeypatch.setattr(kernels, "_library", lambda: None)
    made = layer(inputs, 40)
    for leaf, tensor in quantize.stored_tensors("weight", random(40, inputs).cpu(), kind, quantize.ROWS).items():
        made.take(leaf, tensor)
    made.take("bias", random(40, seed=2).cpu())
    x = random(5, inputs, seed=3)
    stored = quantize.stored_tensors("weight", random(40, inputs).cpu(), kind, quantize.ROWS)
    found = triton_kernels.linear(
        x, stored[f"weight_{kind}"].to(DEVICE), stored["weight_scale"].to(DEVICE), made.bias.to(DEVICE)
    )
    torch.testing.assert_close(found.cpu(), made(x.cpu()), rtol=1e-5, atol=1e-4)


@pytest.fixture
def in_order(monkeypatch):
    """The interpreter multiplies with BLAS, whose order of additions depends on sizes; here they are one by one."""
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    def dot(self, a, b, d, precision, imprecise):
        total = d.data
        for k in range(a.data.shape[-1]):
            total = total + a.data[..., k, None].astype(total.dtype) * b.data[..., k, None, :].astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_linear_does_not_depend_on_the_others(in_order, kind, dtype):
    (weight, scales), _ = weights(33, 1024, kind, dtype)
    x, bias = random(triton_kernels.LARGEST_M, 1024, dtype=dtype), random(33, seed=2)
    alone = triton_kernels.linear(x[40:41], weight, scales, bias)
    # Less the rounded result, so that what rounding hides is seen.
    rest = triton_kernels.linear(x[40:41], weight, scales, bias, residual=-alone)
    for first, last in ((40, 48), (35, 45), (20, 52), (0, 64)):
        residual = -alone.repeat(last - first, 1)
        together = triton_kernels.linear(x[first:last], weight, scales, bias, residual=residual)
        assert torch.equal(together[40 - first : 41 - first], rest)


def norms(size: int, dtype: torch.dtype) -> tuple[nn.LayerNorm, nn.LayerNorm]:
    made = []
    for seed, eps in ((4, 1e-5), (5, 1e-2)):
        norm = nn.LayerNorm(size, eps=eps, device=DEVICE, dtype=dtype).requires_grad_(False)
        norm.weight.copy_(random(size, seed=seed))
        norm.bias.copy_(random(size, seed=seed + 2))
        made.append(norm)
    return made[0], made[1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 2, 80, 1000, 2560, 5120, 16384])
def test_two_norms_are_those_of_torch(size, dtype):
    first, second = norms(size, dtype)
    x = 3 * random(3, size, dtype=dtype) + 20  # a mean far from zero: its square is not the variance
    found = triton_kernels.two_norms(x, first, second)
    for norm, out in zip((first, second), found, strict=True):
        wide = nn.LayerNorm(size, eps=norm.eps, device=DEVICE, dtype=torch.float64).requires_grad_(False)
        wide.load_state_dict(norm.state_dict())
        near(out, wide(x.double()), 20 * (wide.weight.abs() + wide.bias.abs()))
    if dtype == torch.float32:
        torch.testing.assert_close(found, (first(x), second(x)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_may_be_kept_in_float32(dtype):
    (first, second), x = norms(100, torch.float32), random(2, 100, dtype=dtype)
    for norm, out in zip((first, second), triton_kernels.two_norms(x, first, second), strict=True):
        torch.testing.assert_close(out, norm(x.float()).to(dtype), rtol=2 * ONCE[dtype], atol=1e-5)


def turns(batch: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 6 * torch.rand(batch, width // 2, generator=torch.Generator().manual_seed(9))
    cos, sin = torch.cat((angles.cos(), angles.cos()), 1), torch.cat((-angles.sin(), angles.sin()), 1)
    return cos.to(DEVICE, dtype), sin.to(DEVICE, dtype)


def check_attend(heads: int, width: int, turned: int, length: int, positions: list[int], dtype: torch.dtype) -> None:
    """One slot more than answers; cache places that are not to be read hold what is no number."""
    batch = len(positions)
    qkv, (cos, sin) = random(batch, heads, 3, width, dtype=dtype), turns(batch, turned, dtype)
    keys, values = (random(batch + 1, heads, length, width, seed=seed, dtype=dtype) for seed in (1, 2))
    for slot, position in enumerate([*positions, 0]):
        keys[slot, :, max(position, 0) :], values[slot, :, max(position, 0) :] = float("nan"), float("nan")
    before = keys.clone(), values.clone()
    places = torch.tensor(positions, device=DEVICE)
    found = triton_kernels.attend(qkv, cos, sin, keys, values, places)
    assert found.dtype == dtype and found.shape == (batch, heads * width)

    wide = qkv.double()
    swapped = wide[..., :turned].roll(turned // 2, dims=-1) * sin[:, None, None].double()
    # The key as it is rounded, from a cache of one place: beside a tie it may be either of two numbers.
    ones = [qkv.new_zeros(batch, heads, 1, width) for _ in range(2)]
    triton_kernels.attend(qkv, cos, sin, *ones, torch.zeros_like(places))
    wide[:, :, :2, :turned] = (wide[..., :turned] * cos[:, None, None].double() + swapped)[:, :, :2]
    for slot, position in enumerate(positions):
        count = min(max(position, 0), length)
        near(ones[0][slot, :, 0], wide[slot, :, 1], wide[slot].abs().amax(1))
        seen = torch.cat((before[0][slot, :, :count].double(), ones[0][slot].double()), 1)
        read = torch.cat((before[1][slot, :, :count].double(), wide[slot, :, 2:]), 1)
        scores = torch.einsum("hd,hld->hl", wide[slot, :, 0], seen) / width**0.5
        exact = torch.einsum("hl,hld->hd", scores.softmax(-1), read)
        near(found[slot].view(heads, width), exact, 5 * read.abs().amax(1))
        if 0 <= position < length:
            assert torch.equal(keys[slot, :, position], ones[0][slot, :, 0])
            assert torch.equal(values[slot, :, position], qkv[slot, :, 2])
            keys[slot, :, position], values[slot, :, position] = before[0][slot, :, position], float("nan")
    for now, then in zip((keys, values), before, strict=True):  # nothing else was written
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("width", "turned"), [(80, 20), (128, 32), (16, 16), (2, 2)])
def test_attend_rotates_writes_and_attends(width, turned, dtype):
    check_attend(2, width, turned, 200, [0, 1, 63, 64, 65, 130, 199], dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_position_outside_the_cache_writes_nothing(dtype):
    check_attend(2, 80, 20, 70, [69, -1, 70, 71, -70], dtype)
    check_attend(1, 80, 20, 70, [-(2**40), 2**40], dtype)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 150), st.sampled_from(TYPES), st.data())
def test_attend_of_any_size(heads, width, length, dtype, data):
    turned = 2 * data.draw(st.integers(1, max(1, width // 2)))
    positions = data.draw(st.lists(st.integers(-1, length), min_size=1, max_size=3))
    check_attend(heads, max(width, turned), turned, length, positions, dtype)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("size", "heads", "share"), [(160, 2, 0.25), (128, 1, 1.0)])
def test_attend_is_the_attention_of_the_network(size, heads, share, dtype):
    """Decode steps after prompts of three lengths, with qkv and dense by `linear`; also beside float64."""
    config = tiny_config(hidden_size=size, num_attention_heads=heads, rotary_pct=share)
    rotary = Rotary(config)
    attention = Attention(config, 0, rotary).to(DEVICE, dtype)
    exact = Attention(config, 0, rotary).to(DEVICE, torch.float64)
    for number, parameter in enumerate(attention.parameters()):
        parameter.copy_(random(*parameter.shape, seed=number) / size**0.5)
    exact.load_state_dict(attention.state_dict())
    caches = [KVCache(4, 96) for _ in range(3)]
    prompts = random(1 + 70 + 33, size, seed=8, dtype=dtype)
    prefill = StepInput.prefill([1, 70, 33])
    attention(prompts, prefill, caches[0])
    for cache, wide in ((caches[1], dtype), (caches[2], torch.float64)):
        for mine, theirs in zip(cache.layer_cache(0, prompts.new_zeros(1, heads, size // heads, dtype=wide)),
                                caches[0].layer_cache(0, prompts), strict=True):  # fmt: skip
            mine.copy_(theirs)
    errors = []
    for number in range(3):
        positions = torch.tensor([1, 70, 33]) + number
        x = random(3, size, seed=20 + number, dtype=dtype)
        usual = attention(x, StepInput.decode(positions.tolist()), caches[0])
        reference = exact(x.double(), StepInput.decode(positions.tolist()), caches[2])
        qkv = triton_kernels.linear(x, attention.query_key_value.weight, None, attention.query_key_value.bias)
        cos, sin = (table.flatten(1) for table in rotary(positions.to(DEVICE), dtype))
        keys, values = caches[1].layer_cache(0, prompts)
        attended = triton_kernels.attend(qkv.view(3, heads, 3, -1), cos, sin, keys, values, positions.to(DEVICE))
        found = triton_kernels.linear(attended, attention.dense.weight, None, attention.dense.bias)
        if dtype == torch.float32:
            torch.testing.assert_close(found, usual, rtol=1e-5, atol=1e-5)
            for mine, theirs in zip((keys, values), caches[0].layer_cache(0, prompts), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        errors.append([(out.double() - reference).norm() for out in (found, usual)])
    ours, theirs = torch.tensor(errors).norm(dim=0)
    assert ours <= 1.5 * theirs  # torch's own error in the same type


def test_attention_of_an_answer_does_not_depend_on_the_others():
    qkv, (cos, sin) = random(4, 2, 3, 80), turns(4, 20, torch.float32)
    positions = torch.tensor([5, 90, 64, 0], device=DEVICE)
    caches = [[random(4, 2, 96, 80, seed=seed) for seed in (1, 2)] for _ in range(2)]
    together = triton_kernels.attend(qkv, cos, sin, *caches[0], positions)
    for slot in range(4):
        row = slice(slot, slot + 1)
        alone = triton_kernels.attend(qkv[row], cos[row], sin[row], *(t[row] for t in caches[1]), positions[row])
        assert torch.equal(alone[0], together[slot])


def test_attend_takes_a_view_of_a_wider_tensor():
    whole = random(3, 2, 4, 48)[..., :40]
    caches = [[random(3, 2, 9, 40, seed=seed) for seed in (1, 2)] for _ in range(2)]
    positions, turned = torch.tensor([0, 4, 8], device=DEVICE), turns(3, 10, torch.float32)
    found = triton_kernels.attend(whole[:, :, :3], *turned, *caches[0], positions)
    assert torch.equal(found, triton_kernels.attend(whole[:, :, :3].contiguous(), *turned, *caches[1], positions))


def good() -> dict[str, dict[str, torch.Tensor]]:
    x, stored = random(3, 200), quantize.stored_tensors("w", random(40, 200).cpu(), "int4", quantize.ROWS)
    norm = norms(200, torch.float32)
    cos, sin = turns(2, 10, torch.float32)
    return {
        "linear": {"x": x, "weight": random(40, 200), "bias": random(40), "residual": random(3, 40)},
        "int8": {"x": x, "weight": random(40, 200).to(torch.int8), "scales": random(40)},
        "int4": {"x": x, "weight": stored["w_int4"].to(DEVICE), "scales": stored["w_scale"].to(DEVICE)},
        "norms": {"x": x, "first": norm[0], "second": norm[1]},
        "attention": {
            "qkv": random(2, 2, 3, 40), "cos": cos, "sin": sin, "keys": random(2, 2, 9, 40),
            "values": random(2, 2, 9, 40), "positions": torch.tensor([0, 1], device=DEVICE),
        },
    }  # fmt: skip


CALLS = {"norms": triton_kernels.two_norms, "attention": triton_kernels.attend}
WRONG = {
    "linear": {
        "x": [(65, 200), (0, 200), (3, 201), (3, 200, 1), torch.float64, "turned"],
        "weight": [(40, 199), (40,), torch.bfloat16, torch.int8, torch.uint8, "turned"],
        "bias": [(41,), torch.bfloat16, "turned"],
        "residual": [(3, 41), (2, 40), torch.float16, "turned"],
    },
    "int8": {"scales": [(41,), torch.float16, None], "weight": [(40, 199), (39, 200), "turned"]},
    "int4": {"scales": [(40, 1), (80,), torch.float32, None, "turned"], "weight": [(40, 200), (40, 99)]},
    "norms": {
        "x": [(3, 199), (0, 200), (200,), torch.float64, "turned"],
        "second": [nn.LayerNorm(200, bias=False), nn.LayerNorm(200).half(), nn.LayerNorm(1)],
    },
    "attention": {
        "qkv": [(3, 2, 3, 40), (2, 2, 2, 40), (2, 2, 3, 41), torch.bfloat16, "turned"],
        "cos": [(2, 9), (1, 10), (2, 42), torch.float16, "turned"],
        "keys": [(1, 2, 9, 40), (2, 3, 9, 40), (2, 2, 8, 40), (2, 2, 9, 41), torch.bfloat16, "turned"],
        "positions": [(3,), torch.int32],
    },
}


def spoilt(value, how):
    if isinstance(how, tuple):
        return torch.zeros(how, dtype=value.dtype, device=DEVICE)
    if isinstance(how, torch.dtype):
        return value.to(how)
    if how == "turned":  # the same shape and type in another order of memory
        return torch.stack((value, value), dim=-1)[..., 0]
    return how


@pytest.mark.parametrize(
    ("what", "name", "how"),
    [(what, name, how) for what, names in WRONG.items() for name, hows in names.items() for how in hows],
)
def test_what_does_not_fit_is_refused_in_one_line(what, name, how):
    given = good()[what]
    call = CALLS.get(what, triton_kernels.linear)
    call(**given)
    with pytest.raises(ValueError, match="do not fit each other") as caught:
        call(**{**given, name: spoilt(given[name], how)})
    assert "\n" not in str(caught.value) and ("x " in str(caught.value) or "qkv " in str(caught.value))


def test_what_lies_elsewhere_is_refused():
    given = good()["linear"]
    with pytest.raises(ValueError, match="meta"):
        triton_kernels.linear(given["x"], given["weight"].to("meta"))


def test_usable_never_raises():
    assert not triton_kernels.usable(torch.device("cpu"))
    assert not triton_kernels.usable(torch.device("cuda", 99))
    assert not triton_kernels.usable(torch.device("mps"))
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    assert triton_kernels.usable(torch.device("cuda")) == capable


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_usable_from_compute_capability_8_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton_kernels.usable(torch.device("cuda", 0)) is expected


def test_without_triton_the_module_is_imported_and_not_usable():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from modelscope_dolly.kernels import triton_decode as kernels\n"
        "torch.cuda.get_device_capability = lambda device: (9, 0)\n"
        "assert not kernels.usable(torch.device('cuda'))\n"
        "try: kernels.linear(torch.zeros(1, 8), torch.zeros(4, 8))\n"
        "except ValueError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "linear layer" in ran.stdout
