"""Rotary angles; the arithmetic itself is compared with transformers in test_gpt_neox.py."""

from __future__ import annotations

import torch

from modelscope_dolly.engine.rotary import Rotary
from tests.support.models import tiny_config


def test_rotary_angles_do_not_lose_precision_at_the_end_of_the_window():
    rotary = Rotary(tiny_config(rotary_pct=1.0))
    positions = torch.tensor([0, 1, 1000, 2047])
    cos, sin = rotary(positions, torch.bfloat16)
    exact_cos, exact_sin = rotary(positions, torch.float32)
    assert cos.dtype == torch.bfloat16
    assert (cos.float() - exact_cos).abs().max() < 2**-8 and (sin.float() - exact_sin).abs().max() < 2**-8
