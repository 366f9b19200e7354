"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from modelscope_dolly.errors import CheckpointError

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig


class Rotary:
    """Tables of angles for the first R of D values of a head, R = D * rotary_pct.

    Angles are computed in float32 whatever the model's number type, as in transformers.

    Attributes:
        head_width: D.
        width: R.
    """

    def __init__(self, config: NetworkConfig):
        parameters = config.rope_parameters
        if parameters.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"config.json: rope type {parameters['rope_type']!r} is not supported; dolly-v2 uses 'default'"
            )
        self.head_width = config.hidden_size // config.num_attention_heads
        self.width = int(self.head_width * parameters["partial_rotary_factor"])
        exponents = torch.arange(0, self.width, 2, dtype=torch.float, device="cpu") / self.width
        self._frequencies = {torch.device("cpu"): 1.0 / (parameters["rope_theta"] ** exponents)}

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [N, 1, 1, R] for positions [N]; the first half of sin is negative, see apply_rotary."""
        device = positions.device
        if device not in self._frequencies:  # copied once: a captured step may not copy from the host
            self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        angles = positions[:, None].float() * self._frequencies[device]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1)[:, None, None], torch.cat((-sin, sin), dim=-1)[:, None, None]


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate x [N, H, any, D] in place: each pair (i, i + R / 2) by its angle; cos and sin as Rotary gives them."""
    width = cos.shape[-1]
    rotated = x[..., :width]
    swapped = rotated.roll(width // 2, dims=-1)
    rotated.copy_(rotated * cos + swapped.mul_(sin))
