"""The kernels of one decode step on an NVIDIA GPU, in Triton: linear layers, two layer norms, rotary with attention.

How it works
1. A decode step has few rows (one new token for each of B sequences), so its time is that of reading the weights.
   A program of `linear` computes 16 outputs (32 from 17 rows on) and reads their weights in pieces of 256 or 512
   inputs, several pieces ahead (cp.async), so that enough bytes are under way to keep the memory busy.
2. Its four warps share the inputs of a piece, not the outputs: a batched tl.dot of weights [4, outputs, inputs] and
   x [4, inputs, rows], weights on the left so that 8 rows of x fill a tensor core instruction. The four sums are added
   at the end. No order of additions depends on M or on other rows: a row's result is the same in every batch.
3. Quantised weights are widened in registers: int8 to x's type, with one scale per output at the end. int4 is read as
   32-bit words of eight numbers. Put into the lowest bits of 128 (bfloat16) or 1024 (float16), a number from 0 to 15
   adds itself to it, so a mask and a subtraction make the value (Kim et al. 2022, arXiv:2211.10017). The scale of a
   group of 128 inputs is applied to the group's sum of products.
4. `two_norms`: both layer norms of a layer read the same row (parallel residual). One program per row.
5. `attend`: one program per sequence and head rotates query and key, writes key and value into the cache, and goes once
   through the earlier places with running maxima and sums (Milakov and Gimelshein 2018, arXiv:1805.02867), one for
   each line of a tile, put together at the end (as in Dao et al. 2023, "Flash-Decoding"). The new token itself comes
   from registers, so nothing waits for the cache to be written.

Launch settings follow from shapes only, nothing waits for the host and results are deterministic, so a CUDA graph can
record all of it. Checked with Triton's interpreter and compiled for compute capabilities 8.0 and 9.0
(tests/kernels/test_triton_decode.py, test_triton_compiled.py); it has not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import nn

from modelscope_dolly.kernels.cpu import GROUP

try:
    import triton
    import triton.language as tl
except Exception:  # macOS, Windows, torch without CUDA; or an installation that is broken
    triton = None

#: Rows of x that `linear` takes.
LARGEST_M = 64
#: Row length that `two_norms` takes: a row lies in the registers of one program.
_LARGEST_E = 16384
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Warps of a linear program; each sums its share of the inputs.
_PARTS = 4
#: What a linear program has under way at most: bytes of weights, bytes in all (compute capability 8.6 has 99 KB of
#: shared memory for a program), pieces.
_AHEAD, _SHARED, _STAGES = 32 << 10, 96 << 10, 6


def _jit(function):
    return triton.jit(function) if triton else function


@_jit
def _linear(
    x_at, w_at, scale_at, bias_at, residual_at, out_at, M, N, K, W,
    BITS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BITS: 4, 8, or 0: x's type. EVEN: K needs no mask. WIDE: see _interpreted. W: elements of a row of weights."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # those that read the same weights are neighbours
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)  # so that weights need no mask
    part = tl.arange(0, PARTS)[:, None, None]
    k = part * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]
    x_at += m.to(tl.int64)[None, None, :] * K + k
    w_at += row[None, :, None] * W
    if BITS == 4:
        WORDS: tl.constexpr = BLOCK_K // 8
        j = part * WORDS + tl.arange(0, WORDS)[None, None, :]
        groups = K // (PARTS * BLOCK_K) if EVEN else (K + BLOCK_K - 1) // BLOCK_K
        scale_at += row[None, :, None] * groups
    else:
        j = part * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    total = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, PARTS * BLOCK_K, num_stages=STAGES):
        here = (m < M)[None, None, :]
        x = tl.load(x_at + start, here if EVEN else here & (start + k < K), 0.0)
        x = x.to(tl.float32) if WIDE else x
        if BITS == 4:
            if EVEN:  # eight numbers in a word, and the scales of four groups
                word = tl.load(w_at + start // 8 + j)
                scale = tl.load(scale_at + start // (PARTS * BLOCK_K))
                scale = (scale >> (16 * part)).to(tl.int16).to(tl.float16, bitcast=True)
            else:
                word = tl.zeros((PARTS, BLOCK_N, WORDS), tl.int32)
                for i in tl.static_range(4):
                    byte = start // 2 + 4 * j + i
                    word |= tl.load(w_at + byte, byte < W, 0).to(tl.int32) << (8 * i)
                group = start // BLOCK_K + part
                scale = tl.load(scale_at + group, group < groups, 0.0)
            total += _int4_products(word, x, x_at.dtype.element_ty, WIDE) * scale.to(tl.float32)
        else:
            w = tl.load(w_at + start + j) if EVEN else tl.load(w_at + start + j, start + j < K, 0)
            total = tl.dot(w.to(x.dtype), x, total, input_precision="ieee")
    # (0 + 1) + (2 + 3), spelt out: tl.sum might add in another order for another BLOCK_M.
    even, odd = tl.split(tl.permute(tl.reshape(total, (2, 2, BLOCK_N, BLOCK_M)), (2, 3, 0, 1)))
    lower, upper = tl.split(even + odd)
    out = lower + upper
    if BITS == 8:
        out *= tl.load(scale_at + row)[:, None]
    if BIAS:
        out += tl.load(bias_at + row).to(tl.float32)[:, None]
    if GELU:
        out = 0.5 * out * (1.0 + tl.erf(out * 0.7071067811865476))
    at, inside = m.to(tl.int64)[None, :] * N + n[:, None], (m < M)[None, :] & (n < N)[:, None]
    if RESIDUAL:
        out += tl.load(residual_at + at, inside, 0.0).to(tl.float32)
    tl.store(out_at + at, out.to(out_at.dtype.element_ty), inside)


@_jit
def _int4_products(word, x, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Words of eight numbers [parts, outputs, words] times x [parts, 8 words, rows] -> [parts, outputs, rows]."""
    HALF: tl.constexpr = tl.float16 if tl.float16 == TYPE else tl.bfloat16
    ONES: tl.constexpr = 0x64006400 if tl.float16 == TYPE else 0x43004300  # 1024 or 128, twice
    OFFSET: tl.constexpr = 1032.0 if tl.float16 == TYPE else 136.0  # that, and the 8 of the stored form
    # Input 8 j + 4 a + 2 b + c: a chooses the half of the word, 2 b + c the four bits in it.
    x = tl.permute(tl.reshape(x, (x.shape[0], word.shape[2], 2, 2, 2, x.shape[2])), (0, 1, 5, 4, 3, 2))
    a0, a1 = tl.split(x)
    a0b0, a0b1 = tl.split(a0)
    a1b0, a1b1 = tl.split(a1)
    low, high = tl.split(a0b0) + tl.split(a0b1), tl.split(a1b0) + tl.split(a1b1)
    sums = tl.zeros((x.shape[0], word.shape[1], x.shape[2]), tl.float32)
    for i in tl.static_range(4):
        bits = ((word >> (4 * i)) & 0x000F000F) | ONES
        first, second = bits.to(tl.int16).to(HALF, bitcast=True), (bits >> 16).to(tl.int16).to(HALF, bitcast=True)
        if WIDE or tl.float32 == TYPE:
            first, second = first.to(tl.float32), second.to(tl.float32)
        sums = tl.dot(first - OFFSET, low[i], sums, input_precision="ieee")
        sums = tl.dot(second - OFFSET, high[i], sums, input_precision="ieee")
    return sums


def linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    *, gelu: bool = False, residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] @ weight.T + bias, then GELU (exact) if asked, then + residual -> [M, N] in x's type.

    Args:
        x: float32, float16 or bfloat16; M from 1 to LARGEST_M.
        weight: [N, K] of x's type, or as stored in a quantised checkpoint (quantized_linear.py): int8 [N, K], or
            int4 as uint8 [N, ceil(K / 2)].
        scales: float32 [N] for int8, float16 [N, ceil(K / 128)] for int4.
        bias: [N] of x's type or float32.
        residual: [M, N] of x's type.

    Raises:
        ValueError: shapes, types or places that do not fit each other, or a tensor that is not contiguous.
    """
    sound = x.dim() == weight.dim() == 2 and 1 <= len(x) <= LARGEST_M and x.dtype in _FLOATS and min(weight.shape) > 0
    if sound:
        (rows, inputs), outputs = x.shape, len(weight)
        if weight.dtype == torch.uint8:
            sound = _is(scales, (torch.float16,), (outputs, -(-inputs // GROUP)))
        else:
            sound = _is(scales, (torch.float32,), (outputs,)) if weight.dtype == torch.int8 else scales is None
        stored = {torch.uint8: -(-inputs // 2), torch.int8: inputs, x.dtype: inputs}
        sound &= weight.shape[1] == stored.get(weight.dtype)
        sound &= bias is None or _is(bias, (x.dtype, torch.float32), (outputs,))
        sound &= residual is None or _is(residual, (x.dtype,), (rows, outputs))
    _demand(sound, "linear layer", x=x, weight=weight, scales=scales, bias=bias, residual=residual)
    bits = {torch.uint8: 4, torch.int8: 8}.get(weight.dtype, 0)
    wide = x.element_size() // 2  # float32 is computed without tensor cores, and takes twice the room
    block_k = GROUP if bits == 4 else (GROUP if bits else 64) // wide
    block_m = 8 if rows <= 8 else 16 if rows <= 16 or wide == 2 else 32
    block_n = block_m if block_m == 32 else 16
    even = inputs % (_PARTS * block_k) == 0
    if bits == 4 and even:
        weight, scales = weight.view(torch.int32), scales.view(torch.int64)
    ahead = _PARTS * block_k * block_n * (bits or x.element_size() * 8) // 8
    piece = ahead + _PARTS * block_k * block_m * x.element_size()
    stages = min(_STAGES, 1 + _AHEAD // ahead, 1 + _SHARED // wide // piece)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _linear[-(-rows // block_m), -(-outputs // block_n)](
            x, weight, scales, bias, residual, out, rows, outputs, inputs, weight.shape[1],
            BITS=bits, EVEN=even, BIAS=bias is not None, GELU=gelu, RESIDUAL=residual is not None,
            PARTS=_PARTS, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, WIDE=_interpreted(),
            num_warps=_PARTS,
        )  # fmt: skip
    return out


@_jit
def _two_norms(
    x_at, weight1_at, bias1_at, weight2_at, bias2_at, out1_at, out2_at, E, eps1, eps2, WIDTH: tl.constexpr
):  # fmt: skip
    e, inside = tl.arange(0, WIDTH), tl.arange(0, WIDTH) < E
    at = tl.program_id(0).to(tl.int64) * E + e
    x = tl.load(x_at + at, inside, 0.0).to(tl.float32)
    weight1 = tl.load(weight1_at + e, inside, 0.0).to(tl.float32)
    bias1 = tl.load(bias1_at + e, inside, 0.0).to(tl.float32)
    weight2 = tl.load(weight2_at + e, inside, 0.0).to(tl.float32)
    bias2 = tl.load(bias2_at + e, inside, 0.0).to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, 0) / E, 0.0)
    variance = tl.sum(x * x, 0) / E
    out1 = x * tl.rsqrt(variance + eps1) * weight1 + bias1
    out2 = x * tl.rsqrt(variance + eps2) * weight2 + bias2
    tl.store(out1_at + at, out1.to(out1_at.dtype.element_ty), inside)
    tl.store(out2_at + at, out2.to(out2_at.dtype.element_ty), inside)


def two_norms(x: torch.Tensor, first: nn.LayerNorm, second: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Both layer norms of x [M, E], E up to 16384 -> two of [M, E] in x's type.

    Raises:
        ValueError: shapes, types or places that do not fit each other, or a norm without weight and bias.
    """
    tensors = {"weight 1": first.weight, "bias 1": first.bias, "weight 2": second.weight, "bias 2": second.bias}
    sound = x.dim() == 2 and 0 < x.shape[1] <= _LARGEST_E and x.dtype in _FLOATS and len(x) > 0
    sound = sound and all(_is(t, (x.dtype, torch.float32), x.shape[1:]) for t in tensors.values())
    _demand(sound, "layer norms", x=x, **tensors)
    out1, out2 = torch.empty_like(x), torch.empty_like(x)
    width = triton.next_power_of_2(x.shape[1])
    with torch.cuda.device_of(x):
        _two_norms[(len(x),)](
            x, first.weight, first.bias, second.weight, second.bias, out1, out2, x.shape[1], first.eps, second.eps,
            WIDTH=width, num_warps=min(max(width // 512, 4), 16),
        )  # fmt: skip
    return out1, out2


@_jit
def _attend(
    qkv_at, cos_at, sin_at, keys_at, values_at, positions_at, out_at, L, scale, stride_b, stride_h, stride_part,
    D: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """WIDTH: D, filled up to a power of two. PLACES: of the cache, read at a time."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * tl.num_programs(0) + h
    d = tl.arange(0, WIDTH)
    inside, turned = d < D, d < R
    other = tl.where(turned, tl.where(d < R // 2, d + R // 2, d - R // 2), d)
    cos = tl.load(cos_at + b * R + d, turned, 1.0).to(tl.float32)
    sin = tl.load(sin_at + b * R + d, turned, 0.0).to(tl.float32)
    query_at = qkv_at + b * stride_b + h * stride_h
    key_at = query_at + stride_part
    query = tl.load(query_at + d, inside, 0.0).to(tl.float32) * cos
    query += tl.load(query_at + other, inside, 0.0).to(tl.float32) * sin
    key = tl.load(key_at + d, inside, 0.0).to(tl.float32) * cos
    key += tl.load(key_at + other, inside, 0.0).to(tl.float32) * sin
    key = key.to(keys_at.dtype.element_ty)
    value = tl.load(key_at + stride_part + d, inside, 0.0)
    position = tl.load(positions_at + b)
    at, within = head * L * D + position * D + d, d < tl.where((position >= 0) & (position < L), D, 0)
    tl.store(keys_at + at, key, within)
    tl.store(values_at + at, value, within)

    query *= scale
    alone = tl.sum(query * key.to(tl.float32), 0)  # the new token sees itself
    # Each of PLACES lines has a maximum and sums of its own, so that the loop adds nothing up between warps.
    largest, total = tl.zeros((PLACES,), tl.float32) + alone, tl.zeros((PLACES,), tl.float32)
    out = tl.zeros((PLACES, WIDTH), tl.float32)
    end = tl.minimum(position, L).to(tl.int32)
    for start in tl.range(0, end, PLACES, num_stages=STAGES):
        place = start + tl.arange(0, PLACES)
        seen = place < end
        read = seen[:, None] & inside[None, :]
        cached = head * L * D + place[:, None] * D + d[None, :]
        scores = tl.sum(query[None, :] * tl.load(keys_at + cached, read, 0.0).to(tl.float32), 1)
        scores = tl.where(seen, scores, float("-inf"))
        before, largest = largest, tl.maximum(largest, scores)
        shrink, weight = tl.exp(before - largest), tl.exp(scores - largest)
        total = total * shrink + weight
        out = out * shrink[:, None] + weight[:, None] * tl.load(values_at + cached, read, 0.0).to(tl.float32)
    top = tl.max(largest, 0)
    shrink, weight = tl.exp(largest - top), tl.exp(alone - top)
    out = tl.sum(out * shrink[:, None], 0) + weight * value.to(tl.float32)
    out /= tl.sum(total * shrink, 0) + weight
    tl.store(out_at + head * D + d, out.to(out_at.dtype.element_ty), inside)


def attend(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Attention of one new token for each of B slots, whose key and value go into the cache -> [B, H * D].

    Args:
        qkv: [B, H, 3, D] query, key and value of the new tokens, not rotated yet; D contiguous.
        cos, sin: [B, R] of qkv's type, R <= D; as engine.rotary.Rotary makes them, the first half of sin negative.
        keys, values: [S, H, L, D] of qkv's type, S >= B; row b is slot b.
        positions: int64 [B], place of the new token. The places before it are read. With one outside 0 .. L-1 nothing
            is written, and nothing outside the cache is read.

    Raises:
        ValueError: shapes, types or places that do not fit each other.
    """
    sound = qkv.dim() == keys.dim() == 4 and cos.dim() == 2 and qkv.dtype in _FLOATS
    if sound:
        (batch, heads, parts, width), (slots, _, length, _), turned = qkv.shape, keys.shape, cos.shape[1]
        sound = batch > 0 and parts == 3 and qkv.stride(3) == 1 and 0 < turned <= width and turned % 2 == 0
        sound &= slots >= batch and length > 0 and all(_is(t, (qkv.dtype,), (batch, turned)) for t in (cos, sin))
        sound &= all(_is(t, (qkv.dtype,), (slots, heads, length, width)) for t in (keys, values))
        sound &= _is(positions, (torch.int64,), (batch,))
    _demand(sound, "attention", qkv=qkv, cos=cos, sin=sin, keys=keys, values=values, positions=positions)
    out = torch.empty(batch, heads * width, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _attend[heads, batch](
            qkv, cos, sin, keys, values, positions, out, length, width**-0.5, *qkv.stride()[:3],
            D=width, R=turned, WIDTH=triton.next_power_of_2(width), PLACES=128 // qkv.element_size(), STAGES=3,
            num_warps=8,
        )  # fmt: skip
    return out


def usable(device: torch.device) -> bool:
    """Whether these kernels can run there: Triton, and an NVIDIA GPU of compute capability 8.0 or newer."""
    try:
        found = triton is not None and device.type == "cuda" and torch.version.hip is None
        return found and torch.cuda.get_device_capability(device) >= (8, 0)
    except Exception:  # no driver, no such device, a torch without CUDA
        return False


def _interpreted() -> bool:
    """Triton's interpreter has no arithmetic on bfloat16; its numbers are then widened to float32, which is exact."""
    return not isinstance(_linear, triton.JITFunction)


def _is(tensor: torch.Tensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> bool:
    return tensor is not None and tensor.dtype in dtypes and tensor.shape == shape


def _demand(sound: bool, what: str, **tensors: torch.Tensor | None) -> None:
    """The kernels read raw memory: nothing of the wrong size, type or place may reach them. Raises ValueError."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    sound = sound and len({tensor.device for tensor in given.values()}) == 1
    sound &= all(tensor.is_contiguous() or name == "qkv" for name, tensor in given.items())
    if triton is None or not sound or not (_interpreted() or next(iter(given.values())).is_cuda):
        found = (
            f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
            f"{'' if tensor.is_contiguous() else ' (not contiguous)'}"
            for name, tensor in given.items()
        )
        raise ValueError(f"{what}: tensors do not fit each other, or are on no CUDA device: {', '.join(found)}")
