"""Linear layers with packed weights and attention over the key/value cache on a CPU, computed by the compiled library
beside this file (csrc/linear.c, csrc/attention.c), where there is one.

The library is built by setup.py if a compiler is there. It picks AVX-512 VNNI or AVX2 when it runs, and has nothing
for other processors: `level()` is then 0 and callers compute with torch. It runs on torch's own OpenMP threads, so
torch.set_num_threads rules it too.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

#: Kinds of weights and inputs that share a 32-bit word of the packed layout.
INT8, INT4, BF16 = range(3)
#: What `linear` may do to its outputs.
ACTIVATIONS = (None, "gelu")
_PER_WORD = {INT8: 4, INT4: 8, BF16: 2}
#: Inputs of one output that share a scale in int4.
GROUP = 128
#: Sums of products of two 8-bit numbers fit 32 bits up to here.
LARGEST_K = 1 << 16
_FLOATS = (torch.float32, torch.bfloat16)
#: Of the functions called here; see the end of csrc/linear.c.
_INTERFACE = 2
_LEVELS = ("none", "AVX2", "AVX-512 VNNI")


@functools.cache
def _library() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            # After torch: its OpenMP runtime is in the process, and ours resolves to the same one.
            library = ctypes.CDLL(str(path))
            library.dolly_level.restype = ctypes.c_int
            if library.dolly_interface() == _INTERFACE and library.dolly_level() > 0:
                number, place = ctypes.c_int64, ctypes.c_void_p
                library.dolly_linear.argtypes = [*[ctypes.c_int] * 5, *[number] * 3, *[place] * 5, ctypes.c_int]
                library.dolly_attend.argtypes = [*[ctypes.c_int] * 3, *[number] * 6, *[place] * 8, ctypes.c_int]
                library.dolly_quantise.argtypes = [
                    *[ctypes.c_int] * 2, *[number] * 2, place, number, *[place] * 2, ctypes.c_int
                ]  # fmt: skip
                return library
        except (OSError, AttributeError):  # built for another system, or by another version
            continue
    return None


def level() -> int:
    """0: no library, or none for this processor; 1: AVX2; 2: AVX-512 VNNI."""
    library = _library()
    return library.dolly_level() if library else 0


def describe() -> str:
    """What computes packed linear layers and the attention of decode steps on this CPU, for the log."""
    return f"own kernels ({_LEVELS[level()]})" if level() else "torch (no compiled kernels for this machine)"


def pack(words: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """Rows of 32-bit words [N, W], one row per output -> [N/16, W, 16], N padded with rows of `padding`."""
    rows, width = words.shape
    if rows % 16:
        words = torch.cat((words, words.new_full((-rows % 16, width), padding)))
    return words.reshape(-1, 16, width).transpose(1, 2).contiguous()


def unpack(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """What `pack` has been given: [N/16, W, 16] -> [N, W]."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:rows]


def linear(
    kind: int,
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    activation: str | None = None,
    at_level: int | None = None,
    row_bytes: int = 2,
) -> torch.Tensor:
    """x [M, K] @ weights.T + bias -> [M, outputs], in the number type of x.

    Args:
        kind: INT8, INT4 or BF16; see csrc/linear.c for the layouts.
        x: float32 or bfloat16 on the CPU.
        weights: packed.
        scales: float32 [N] for INT8, float16 [N/16, K/128, 16] for INT4, None for BF16.
        bias: float32 [N] or None.
        outputs: N.
        activation: None, or "gelu": the exact GELU of the sum, before it is rounded to the number type of x.
        at_level: an instruction set below the best one, for tests.
        row_bytes: of a value of x when its row is quantised for INT8 and INT4, 1 or 2.
    """
    rows, inputs = x.shape
    _fits(kind, x, inputs, outputs, weights, scales, bias)
    x = x.contiguous()
    out = torch.empty(rows, outputs, dtype=x.dtype)
    failed = _library().dolly_linear(
        min(level(), at_level or level()), kind, row_bytes, x.dtype == torch.bfloat16,
        ACTIVATIONS.index(activation), rows, outputs, inputs,
        x.data_ptr(), weights.data_ptr(), scales.data_ptr() if scales is not None else None,
        bias.data_ptr() if bias is not None else None, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for {rows} quantised rows of {inputs}")
    return out


def _fits(kind, x, inputs, outputs, weights, scales, bias) -> None:
    """The library reads raw memory: nothing of the wrong size or type may reach it."""
    words = -(-inputs // GROUP) * (GROUP // 8) if kind == INT4 else -(-inputs // _PER_WORD[kind])
    blocks = -(-outputs // 16)
    sound = x.dtype in _FLOATS and x.device.type == "cpu"
    sound &= weights.dtype == torch.int32 and weights.shape == (blocks, words, 16) and weights.is_contiguous()
    if kind == INT8:
        sound &= scales.dtype == torch.float32 and scales.shape == (outputs,) and scales.is_contiguous()
    if kind == INT4:
        sound &= scales.dtype == torch.float16 and scales.shape == (blocks, words * 8 // GROUP, 16)
        sound &= scales.is_contiguous()
    if bias is not None:
        sound &= bias.dtype == torch.float32 and bias.shape == (outputs,) and bias.is_contiguous()
    if not sound:
        raise ValueError(
            f"linear layer of {inputs} inputs and {outputs} outputs: x {x.dtype} on {x.device}, weights "
            f"{weights.dtype} {list(weights.shape)} do not fit each other"
        )


def quantise_rows(x: torch.Tensor, panel: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x [M, K] as whole numbers from -127 to 127 times a factor: (q, factors float32 [M]).

    q is int8 [M, K padded to 4], or, for `panel` rows lying together, [M/panel, K/4, panel, 4].
    """
    rows, inputs = x.shape
    words = -(-inputs // 4)
    shape = (rows, words * 4) if panel == 1 else (-(-rows // panel), words, panel, 4)
    q = torch.zeros(shape, dtype=torch.int8) if rows % panel else torch.empty(shape, dtype=torch.int8)
    factors = torch.empty(rows, dtype=torch.float32)
    if x.dtype not in _FLOATS:
        x = x.float()
    x = x.contiguous()
    _library().dolly_quantise(
        level(), x.dtype == torch.bfloat16, rows, inputs, x.data_ptr(), panel, q.data_ptr(), factors.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return q, factors


def attends(device: torch.device, dtype: torch.dtype, width: int, rotated: int) -> bool:
    """Whether `attend` computes heads of `width` values, the first `rotated` of them rotated."""
    return device.type == "cpu" and dtype in _FLOATS and width % 16 == 0 and rotated % 2 == 0 and level() > 0


def attend(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    at_level: int | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values into the cache, and look at each token's places 0 .. position.

    Args:
        qkv: [N, H, 3, D] query, key and value of N tokens, float32 or bfloat16; see `attends`.
        cos, sin: float32 [N, ..., R], as engine.rotary.Rotary gives them.
        slots, positions: int64 [N]; no two tokens have the same place. The earlier places of a slot are in the cache.
        keys, values: [B, H, length, D] the cache, float32 or bfloat16; written.
        at_level: an instruction set below the best one, for tests.

    Returns:
        [N, H * D] in the number type of `qkv`.

    Raises:
        IndexError: a slot or position is outside the cache; nothing was written.
    """
    tokens, heads, _, width = qkv.shape
    _fit_attention(qkv, cos, sin, slots, positions, keys, values)
    out = torch.empty(tokens, heads * width, dtype=qkv.dtype)
    failed = _library().dolly_attend(
        min(level(), at_level or level()), qkv.dtype == torch.bfloat16, keys.dtype == torch.bfloat16,
        tokens, heads, width, cos.shape[-1], keys.shape[0], keys.shape[2],
        *(tensor.data_ptr() for tensor in (qkv, cos, sin, slots, positions, keys, values, out)),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed == 2:
        raise IndexError(f"a token lies outside a cache of {keys.shape[0]} slots of {keys.shape[2]} places")
    if failed:
        raise MemoryError(f"no memory for the scores of {tokens} tokens")
    return out


def _fit_attention(qkv, cos, sin, slots, positions, keys, values) -> None:
    """As _fits."""
    tokens, heads, _, width = qkv.shape
    turned, length = cos.shape[-1], keys.shape[2]
    sound = attends(qkv.device, qkv.dtype, width, turned) and qkv.shape[2] == 3 and turned <= width
    sound &= all(table.dtype == torch.float32 and table.numel() == tokens * turned for table in (cos, sin))
    sound &= all(places.dtype == torch.int64 and places.shape == (tokens,) for places in (slots, positions))
    sound &= keys.dtype in _FLOATS and keys.dtype == values.dtype and keys.shape == values.shape
    sound &= keys.shape == (keys.shape[0], heads, length, width)
    tensors = (qkv, cos, sin, slots, positions, keys, values)
    if not sound or not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors):
        raise ValueError(
            f"attention of {tokens} tokens with {heads} heads of {width}: qkv {qkv.dtype} {list(qkv.shape)} on "
            f"{qkv.device}, cache {keys.dtype} {list(keys.shape)}, {values.dtype} {list(values.shape)}, "
            f"{list(slots.shape)} slots and {list(positions.shape)} positions do not fit each other"
        )
