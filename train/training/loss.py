"""The loss of a forward pass: cross entropy of its response tokens, divided by those of the whole global batch.

Divided like this, the gradient of a step is the same whatever the number of ranks, of accumulation steps, and of
records per pass. Logits are computed where there is a label and nowhere else: on databricks-dolly-15k that is 41 % of
the tokens, and the 50,280-wide logits of the others never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GPTNeoXForCausalLM

from train.training.packed_attention import packed_inputs

Example = tuple[Sequence[int], int]  # token ids, length of the prompt
IGNORED = -100  # label of a token that is not learned, as in torch's cross_entropy


def packed_batch(records: Sequence[Example], filler: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Inputs and labels of one forward pass.

    Args:
        records: (token ids, length of the prompt) of each; empty for a rank that has nothing to do in this pass.
        filler: id of the one token that then runs through the network, without a label.
        device: of the tensors.

    Returns:
        packed_inputs(...) and labels [1, N]: labels[i] is what token i is to predict.
    """
    ids = [list(tokens) for tokens, _ in records] or [[filler]]
    labels: list[int] = []
    for tokens, prompt in records:
        labels += [IGNORED] * (prompt - 1) + list(tokens[prompt:]) + [IGNORED]
    return {**packed_inputs(ids, device), "labels": torch.tensor(labels or [IGNORED], device=device)[None]}


def label_count(records: Sequence[Example]) -> int:
    """Response tokens of some records."""
    return sum(len(tokens) - prompt for tokens, prompt in records)


def response_loss(model: GPTNeoXForCausalLM, batch: dict[str, Any], label_total: int) -> torch.Tensor:
    """Scalar loss of one forward pass; the losses of all passes of a step add up to the mean over the global batch.

    Args:
        model: with attention `dolly_packed` for a packed batch.
        batch: from packed_batch or padded_batch.
        label_total: response tokens of the global batch.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "all_logits")}
    hidden = model.gpt_neox(**inputs).last_hidden_state
    if batch.get("all_logits"):  # as in 2023: the loss looks at every token, and most of them only to be ignored
        return _cross_entropy(model.lm_head(hidden).flatten(0, 1), batch["labels"].flatten()) / label_total
    learned = batch["labels"] != IGNORED
    # With no label at all the sum is 0, and still a function of the weights, so that every rank joins the exchange.
    return _cross_entropy(model.lm_head(hidden[learned]), batch["labels"][learned]) / label_total


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over labels [N] of logits [N, V], in float32 at least."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def padded_batch(
    records: Sequence[Example], filler: int, multiple: int = 8, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The same the 2023 way, for comparison: a row per record, padded to the longest, and logits of every token."""
    records = records or [((filler,), 1)]
    width = -(-max(len(tokens) for tokens, _ in records) // multiple) * multiple
    ids = torch.full((len(records), width), filler, device=device)
    labels = torch.full((len(records), width), IGNORED, device=device)
    mask = torch.zeros((len(records), width), dtype=torch.long, device=device)
    for row, (tokens, prompt) in enumerate(records):
        ids[row, : len(tokens)] = torch.tensor(list(tokens))
        labels[row, prompt - 1 : len(tokens) - 1] = torch.tensor(list(tokens[prompt:]))
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, "all_logits": True}
