"""Records of a pass -> the tensors of one forward pass: ids, positions, record boundaries, labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from train.data.batch_plan import BatchPlan

Example = tuple[Sequence[int], int]  # token ids, length of the prompt
IGNORED = -100  # label of a token that is not learned, as in torch's cross_entropy


def packed_inputs(records: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Keyword arguments of a GPT-NeoX forward pass over whole records without padding.

    Args:
        records: token ids of each record, none empty.
        device: of the tensors.

    Returns:
        input_ids and position_ids [1, N], cu_seq_lens [records + 1], record_lengths, use_cache False.
    """
    lengths = [len(record) for record in records]
    ids = torch.tensor([token for record in records for token in record], device=device)[None]
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seq_lens": ends,
        "record_lengths": tuple(lengths),
        "use_cache": False,
    }


def packed_batch(records: Sequence[Example], filler: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Inputs and labels of one forward pass.

    Args:
        records: (token ids, length of the prompt) of each; empty for a rank that has nothing to do in this pass.
        filler: id of the single token that then runs through the network, without a label.
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


class PassDataset(Dataset):
    """The forward passes of a plan in order: step by step, micro-step by micro-step, one item per rank.

    Accelerate deals items out to ranks in turn, so item i goes to rank i % world.

    Args:
        plan: of the run.
        examples: the records that it speaks of.
        filler: see packed_batch.
        collate: records of a pass, filler -> its tensors.
    """

    def __init__(
        self, plan: BatchPlan, examples: Sequence[Example], filler: int, collate: Callable[..., dict] = packed_batch
    ):
        self.plan, self.examples, self.filler, self.collate = plan, examples, filler, collate
        self.label_totals = [
            label_count([examples[i] for rank in step for records in rank for i in records]) for step in plan.steps
        ]

    def __len__(self) -> int:
        return len(self.plan.steps) * self.plan.accumulation * self.plan.world

    def __getitem__(self, item: int) -> dict[str, Any]:
        """The tensors, and the response tokens of the whole global batch as `label_total`."""
        index, rank = divmod(item, self.plan.world)
        step, micro_step = divmod(index, self.plan.accumulation)
        records = [self.examples[i] for i in self.plan.steps[step][rank][micro_step]]
        return {**self.collate(records, self.filler), "label_total": self.label_totals[step]}
