"""Attention over texts laid end to end, without padding, in one call of torch's variable-length kernel.

It is for CUDA from Ampere on and half precision (Dao 2023, arXiv:2307.08691, by way of torch.nn.attention.varlen).
Prompts and training records go through the same call. It has not run on a GPU yet, hence it is tried on two short
texts before it is used.
"""

from __future__ import annotations

import functools
import inspect
import logging

import torch
from torch.nn import functional as F

from modelscope_dolly.errors import one_line
from modelscope_dolly.kernels.self_test import distance

log = logging.getLogger("modelscope.dolly")

_CAPABILITY = (8, 0)
#: Distance from the ordinary attention, see self_test.distance; half precision rounds to 0.4 %.
_TOLERANCE = 0.05


def works(query: torch.Tensor, dropout: float = 0.0) -> bool:
    """Whether the kernel computes tensors like this one."""
    if query.device.type != "cuda" or dropout or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.cuda.get_device_capability(query.device) < _CAPABILITY:
        return False
    return _passes_self_test(query.device, query.dtype, query.shape[-1])


@functools.cache
def _passes_self_test(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether two texts come out as from torch's ordinary attention; a warning if not."""
    lengths = [3, 5]
    texts = torch.randn(3, sum(lengths), 2, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    expected = [
        F.scaled_dot_product_attention(*part.transpose(1, 2), is_causal=True).transpose(0, 1)
        for part in texts.split(lengths, dim=1)
    ]
    try:
        ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        error = distance(attend(*texts, ends, max(lengths)), torch.cat(expected))
        reason = f"it is {error:.2g} away from the ordinary one" if not error < _TOLERANCE else None
    except Exception as error:  # a kernel that this card or this torch lacks
        reason = f"{type(error).__name__}: {one_line(error)}"
    if reason:
        log.warning("attention of variable length cannot be used on %s (%s)", device, reason)
    return reason is None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None = None,
) -> torch.Tensor:
    """Causal attention, each text on its own.

    Args:
        query, key, value: [N, H, D].
        ends: int32 [texts + 1] on the same device: 0, and where each text ends.
        longest: tokens of the longest text.
        scaling: factor on the scores (default 1 / sqrt(D)).

    Returns:
        [N, H, D].
    """
    from torch.nn.attention.varlen import varlen_attn

    known = _keywords()
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if scaling is not None and "scale" in known:
        causal["scale"] = scaling
    return varlen_attn(query, key, value, ends, ends, longest, longest, **causal)


@functools.cache
def _keywords() -> frozenset[str]:
    """Of torch's function: the one for causal attention was renamed between releases."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)
