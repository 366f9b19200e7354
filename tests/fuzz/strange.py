"""Values that nobody expects, for every place where a user's value goes in."""

from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Raising:
    """Raises whatever it is asked."""

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError("asked\nfor it")

    __eq__ = __ne__ = __lt__ = __le__ = __str__ = __repr__ = __bool__ = __len__ = __iter__ = __fspath__ = _fail
    __hash__ = object.__hash__


class Text(str):
    """A text that is more than one."""

    __slots__ = ()

    def __repr__(self) -> str:
        raise ValueError("no")


#: Makes one value each; most belong nowhere.
VALUES = (
    lambda rng: None,
    lambda rng: rng.choice((True, False)),
    lambda rng: rng.choice((0, 1, -1, 2, 7, 2**31, 2**32, 2**63, 2**64, -(2**63))),
    lambda rng: rng.choice((10**400, -(10**400), 10**5000)),
    lambda rng: rng.choice((0.0, -0.0, 0.5, 1.0, 1e-300, 5e-324, 1e300, float("nan"), float("inf"), -float("inf"))),
    lambda rng: rng.choice((np.int64, np.int8, np.uint64, np.int32))(rng.randrange(100)),
    lambda rng: rng.choice((np.float32, np.float16, np.float64))(rng.random() * 2),
    lambda rng: rng.choice((np.bool_(True), np.str_("auto"), np.datetime64("2026-11-21"))),
    lambda rng: np.arange(rng.randrange(4)),
    lambda rng: np.array(["auto", "cpu"]),
    lambda rng: torch.tensor(rng.choice((3, 0.5, [1, 2], True))),
    lambda rng: rng.choice((torch.float16, torch.int8, torch.device("cpu"), torch.device("meta"))),
    lambda rng: rng.choice((Decimal("0.5"), Decimal("NaN"), Fraction(1, 3), Fraction(1, 10**400), 1 + 2j)),
    lambda rng: rng.choice(("", " ", "auto", "cpu", "none", "int8", "bf16", "error", "x" * 300, "x" * 100_000)),
    lambda rng: rng.choice(("a\0b", "\ud800", "\n", "~nobody/x", "/dev/null/x", "\x1b[2J", "cuda:" + "9" * 5000, "..")),
    lambda rng: rng.choice((b"auto", bytearray(b"1"), memoryview(b"1"))),
    lambda rng: rng.choice(((), [], {}, set(), [None], ["a", ""], ("a", 1), {"": "cpu"}, {1: "cpu"}, {"": 10**400})),
    lambda rng: rng.choice((Raising(), Text("auto"), object(), int, len, Raising, iter([]), NotImplemented, ...)),
    lambda rng: rng.choice((Path("x"), Path("x" * 300), Path("/dev/null"), Path("/proc/self"))),
    lambda rng: {rng.choice(("instruction", "text", "context", "x", 3)): a_value(rng)},
    lambda rng: [a_value(rng) for _ in range(rng.randrange(3))],
)


def a_value(rng: random.Random) -> Any:
    return rng.choice(VALUES)(rng)
