"""A kernel is compared with the ordinary computation on its first input, before it is trusted."""

from __future__ import annotations

import torch


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference as a share of the spread of `expected`; NaN where one has a NaN."""
    expected = expected.float()
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm()
    return float((actual.float() - expected).norm() / spread.clamp(min=1e-30))
