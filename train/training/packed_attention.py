"""Attention for records laid end to end: each token sees the earlier tokens of its own record and nothing else.

Registered with transformers under the name `dolly_packed`, so that its GPT-NeoX runs unchanged. On CUDA from Ampere on,
torch's own variable-length kernel does it in one call; elsewhere causal attention runs record by record. Neither ever
builds a mask of tokens x tokens.

Two silent traps: with `use_cache` left on, transformers does not recognise packed records from position_ids, and
records see each other; and without position_ids every record but the first gets wrong rotary positions.
`train.data.collate.packed_inputs` gives everything that a forward pass needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from modelscope_dolly.kernels import varlen_attention as varlen

NAME = "dolly_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens: torch.Tensor | None = None,
    record_lengths: Sequence[int] | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over packed records, in the form transformers' AttentionInterface calls.

    Args:
        query, key, value: [1, H, N, D], all records laid end to end.
        scaling: factor on the scores (default 1 / sqrt(D)).
        dropout: of the attention weights.
        cu_seq_lens: [records + 1] int32, where each record begins, and where the last one ends; same device as query.
        record_lengths: the same as lengths on the host, so that the CPU need not wait for the GPU to read them.

    Returns:
        [1, N, H, D], None.
    """
    assert record_lengths is not None and cu_seq_lens is not None, "pass packed_inputs(...) to the model"
    assert query.shape[0] == 1 and query.shape[2] == sum(record_lengths), (tuple(query.shape), record_lengths)
    if varlen.works(query, dropout):
        flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        out = varlen.attend(*flat, cu_seq_lens, max(record_lengths), scaling).transpose(0, 1)[None]
    else:
        out = torch.cat(
            [
                F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
                for q, k, v in zip(*(t.split(list(record_lengths), dim=2) for t in (query, key, value)), strict=True)
            ],
            dim=2,
        )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
