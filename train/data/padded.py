"""Batches of the 2023 loop, padded to their longest record: the yardstick of `train.bench` and `train.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modelscope_dolly.errors import SettingError
from train.data.batch_plan import BatchPlan, global_batches, make_plan
from train.data.collate import IGNORED, Example

#: Records of one forward pass in the public recipe, which rounds their length up to a multiple of 8.
RECORDS_PER_BATCH, MULTIPLE = 6, 8


def padded_plan(
    lengths: Sequence[int], seed: int, epochs: int, global_batch_size: int, world: int, records_per_batch: int
) -> BatchPlan:
    """The steps of packed_plan; the records of each in order, `records_per_batch` to a pass.

    Raises:
        SettingError: the global batch is not a multiple of the ranks' passes, or see global_batches.
    """
    batches = global_batches(lengths, seed, epochs, global_batch_size, world)
    if global_batch_size % (world * records_per_batch):
        raise SettingError(
            f"global_batch_size is {global_batch_size}, it must be a multiple of {world} ranks x padded batches of "
            f"{records_per_batch} = {world * records_per_batch}"
        )
    steps = []
    for batch in batches:
        passes = [tuple(batch[begin : begin + records_per_batch]) for begin in range(0, len(batch), records_per_batch)]
        passes += [()] * (global_batch_size // records_per_batch - len(passes))
        steps.append(tuple(tuple(passes[rank::world]) for rank in range(world)))
    return make_plan(tuple(steps), lengths, lambda batch: len(batch) * padded_length(batch))


def padded_batch_size(global_batch_size: int, world: int) -> int:
    """RECORDS_PER_BATCH, or the largest smaller number whose passes divide the global batch evenly; at least 1."""
    sizes = range(1, RECORDS_PER_BATCH + 1)
    return max((size for size in sizes if global_batch_size % (world * size) == 0), default=1)


def padded_length(lengths: Sequence[int]) -> int:
    """Tokens that each row of a padded batch has."""
    return -(-max(lengths) // MULTIPLE) * MULTIPLE


def padded_batch(records: Sequence[Example], filler: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """input_ids, attention_mask and labels [records, padded length]; see collate.packed_batch."""
    records = records or [((filler,), 1)]
    width = padded_length([len(tokens) for tokens, _ in records])
    ids = torch.full((len(records), width), filler, device=device)
    labels = torch.full((len(records), width), IGNORED, device=device)
    mask = torch.zeros((len(records), width), dtype=torch.long, device=device)
    for row, (tokens, prompt) in enumerate(records):
        ids[row, : len(tokens)] = torch.tensor(list(tokens))
        labels[row, prompt - 1 : len(tokens) - 1] = torch.tensor(list(tokens[prompt:]))
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
