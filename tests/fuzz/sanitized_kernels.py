"""Random calls of the compiled kernels, in a process of its own: `python sanitized_kernels.py LIBRARY SECONDS SEED`.

The library is built with sanitizers, whose runtime is preloaded: every buffer has its exact size, so that a read or
write beside it ends the process, and so does an operation that C does not define. The values are of every kind, finite
or not. Nothing of the package is imported. Prints the number of cases.
"""

from __future__ import annotations

import ctypes
import random
import sys
import time

import numpy as np

INT8, INT4, BF16 = range(3)
GROUP = 128


def main(library: str, seconds: float, seed: int) -> None:
    kernels = ctypes.CDLL(library)
    number, place = ctypes.c_int64, ctypes.c_void_p
    kernels.dolly_linear.argtypes = [*[ctypes.c_int] * 5, *[number] * 3, *[place] * 5, ctypes.c_int]
    kernels.dolly_attend.argtypes = [*[ctypes.c_int] * 3, *[number] * 6, *[place] * 8, ctypes.c_int]
    kernels.dolly_quantise.argtypes = [*[ctypes.c_int] * 2, *[number] * 2, place, number, *[place] * 2, ctypes.c_int]
    best, end, count = kernels.dolly_level(), time.monotonic() + seconds, 0
    while best and (not count or time.monotonic() < end):
        rng = random.Random(f"{seed}:{count}")
        print(f"case {count} of seed {seed}", file=sys.stderr)  # the last one is the one that failed
        rng.choice((_linear, _linear, _attend, _quantise))(kernels, rng, rng.randint(1, best))
        count += 1
    print(count)


def _buffer(size: int) -> np.ndarray:
    """Bytes that the C library allocates, so that the sanitizer knows where they end; NumPy keeps small ones itself."""
    return np.frombuffer((ctypes.c_uint8 * max(size, 1)).from_buffer(bytearray(max(size, 1))), np.uint8)


def _numbers(rng: random.Random, count: int, bf16: int) -> np.ndarray:
    generator = np.random.default_rng(rng.randrange(2**32))
    values = generator.normal(size=count).astype(np.float32) * np.float32(10.0 ** rng.uniform(-40, 38))
    if rng.random() < 0.4 and count:
        bad = (np.nan, np.inf, -np.inf, -np.nan, 0.0, 3.4e38, 1e-45, -3.4e38)
        for _ in range(rng.randrange(1, 5)):
            values[rng.randrange(count)] = rng.choice(bad)
    if rng.random() < 0.1:
        values[:] = rng.choice((0.0, np.nan, np.inf, 1.0))
    raw = (values.view(np.uint32) >> 16).astype(np.uint16) if bf16 else values
    return _copied(raw)


def _copied(values: np.ndarray) -> np.ndarray:
    place = _buffer(values.nbytes)
    place[: values.nbytes] = np.frombuffer(values.tobytes(), np.uint8)
    return place


def _bytes(rng: random.Random, count: int) -> np.ndarray:
    return _copied(np.frombuffer(rng.randbytes(count), np.uint8))


def _linear(kernels, rng: random.Random, level: int) -> None:
    kind, bf16, rows = rng.randrange(3), rng.randrange(2), rng.choice((1, 2, 5, 12, 13, 30))
    outputs, inputs = rng.randrange(1, 150), rng.choice((rng.randrange(1, 40), rng.randrange(1, 600)))
    groups, blocks = -(-inputs // GROUP), -(-outputs // 16)
    words = groups * 16 if kind == INT4 else -(-inputs // (4 if kind == INT8 else 2))
    x, weights = _numbers(rng, rows * inputs, bf16), _bytes(rng, blocks * words * 64)
    scales = {INT8: _numbers(rng, outputs, 0), INT4: _bytes(rng, blocks * groups * 32), BF16: None}[kind]
    bias, out = (
        (_numbers(rng, outputs, 0) if rng.random() < 0.5 else None),
        _buffer(rows * outputs * (2 if bf16 else 4)),
    )
    failed = kernels.dolly_linear(
        level, kind, rng.choice((1, 2)), bf16, rng.randrange(2), rows, outputs, inputs, x.ctypes.data,
        weights.ctypes.data, scales.ctypes.data if scales is not None else None,
        bias.ctypes.data if bias is not None else None,
        out.ctypes.data, rng.choice((1, 2, 3)),
    )  # fmt: skip
    assert failed == 0


def _quantise(kernels, rng: random.Random, level: int) -> None:
    bf16, rows, inputs, panel = rng.randrange(2), rng.randrange(1, 20), rng.randrange(1, 300), rng.choice((1, 16))
    padded = -(-inputs // 4) * 4
    x, factors = _numbers(rng, rows * inputs, bf16), _buffer(rows * 4)
    q = _buffer((rows if panel == 1 else -(-rows // panel) * panel) * padded)
    kernels.dolly_quantise(level, bf16, rows, inputs, x.ctypes.data, panel, q.ctypes.data, factors.ctypes.data, 2)


def _attend(kernels, rng: random.Random, level: int) -> None:
    bf16, cache_bf16, heads, width = rng.randrange(2), rng.randrange(2), rng.randrange(1, 4), 16 * rng.randrange(1, 10)
    turned, slots, length = 2 * rng.randrange(0, width // 2 + 1), rng.randrange(1, 4), rng.randrange(1, 70)
    places = rng.sample(range(slots * length), rng.randrange(1, min(slots * length, 9) + 1))
    tokens = len(places)
    slot, position = (
        _copied(np.array(part, np.int64)) for part in zip(*[divmod(p, length) for p in places], strict=True)
    )
    qkv = _numbers(rng, tokens * heads * 3 * width, bf16)
    cos, sin = (_numbers(rng, tokens * turned, 0) for _ in range(2))
    keys, values = (_numbers(rng, slots * heads * length * width, cache_bf16) for _ in range(2))
    out = _buffer(tokens * heads * width * (2 if bf16 else 4))
    outside = rng.random() < 0.1
    if outside:
        wrong = rng.choice((slot, position)).view(np.int64)
        wrong[rng.randrange(tokens)] = rng.choice((-1, max(slots, length), 2**62, -(2**62)))
    failed = kernels.dolly_attend(
        level, bf16, cache_bf16, tokens, heads, width, turned, slots, length,
        *(part.ctypes.data for part in (qkv, cos, sin, slot, position, keys, values, out)), rng.choice((1, 2, 3)),
    )  # fmt: skip
    assert failed == (2 if outside else 0), failed


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
