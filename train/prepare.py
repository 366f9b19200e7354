"""Everything about a run that can be known before its model is loaded: records, examples, and the batch plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from modelscope_dolly.checkpoint.config import read_config
from modelscope_dolly.checkpoint.download import SIDE_FILES, locate
from modelscope_dolly.checkpoint.tokenizer import read_tokenizer
from modelscope_dolly.engine.network_config import NetworkConfig
from modelscope_dolly.errors import SettingError
from modelscope_dolly.prompt import DollyTokenizer
from train.config import TrainConfig
from train.data.batch_plan import BatchPlan, packed_plan
from train.data.collate import Example, packed_batch
from train.data.sources import read_records
from train.data.validate import CheckedRecords, TrainingRecord, check_records, shown_in_an_epoch, split, with_split
from train.planning.memory import Job
from train.publishing.publish_settings import PublishSettings
from train.training import packed_attention
from train.training.lora import Lora, check_base, read_lora
from train.training.loss import response_loss


class Batching(NamedTuple):
    """How records become forward passes, and passes a loss. Training packs; train.bench also measures padding."""

    plan: Callable[..., BatchPlan]  # (lengths, seed, epochs, global_batch_size, world, size)
    size: int  # of one forward pass: tokens of a packed one, records of a padded one
    collate: Callable[..., dict]  # (records of a pass, filler) -> its tensors
    attention: str  # transformers' name of the attention that they need
    loss: Callable[..., torch.Tensor]  # (network, inputs, labels, label_total)


def packed(config: TrainConfig) -> Batching:
    """Whole records laid end to end, without padding."""
    return Batching(packed_plan, config.tokens_per_batch, packed_batch, packed_attention.NAME, response_loss)


@dataclass(frozen=True)
class PreparedData:
    """What every process of a run computes for itself, with the same result.

    Attributes:
        batching: how records become forward passes.
        base: directory of the base model.
        network: its configuration, with the vocabulary that training gives it.
        tokenizer: with the three keys.
        sha256: of the records as they were read.
        checked: the usable records and the report on all of them.
        examples, held_out: for training and for evaluation.
        held_out_records: the texts of the latter.
        plan: for this number of processes.
        lora: settings of the adapters, if any are trained.
    """

    batching: Batching
    base: Path
    network: NetworkConfig
    tokenizer: DollyTokenizer
    sha256: str
    checked: CheckedRecords
    examples: list[Example]
    held_out: list[Example]
    held_out_records: list[TrainingRecord]
    plan: BatchPlan
    lora: Lora | None

    @cached_property
    def most_labels(self) -> int:
        """Response tokens of the pass that has most of them, which need not be the one with most tokens."""
        labels = [len(ids) - prompt for ids, prompt in self.examples]
        passes = (records for step in self.plan.steps for rank in step for records in rank)
        return max(sum(labels[i] for i in records) for records in passes)

    @property
    def job(self) -> Job:
        """The input of the memory arithmetic."""
        job = Job(self.network, self.plan.largest.tokens, self.most_labels)
        if self.lora is None:
            return job
        return replace(job, lora_rank=self.lora.r, lora_targets=self.lora.targets, lora_bits=self.lora.bits)

    def summary(self) -> dict:
        """Figures for people, for `train.plan --json`, and for run.json."""
        report = self.checked.report
        return {
            "records": report.rows,
            "records_kept": report.kept,
            "records_held_out": len(self.held_out),
            "tokens": report.tokens_kept,
            "label_tokens": report.label_tokens_kept,
            **{name: value for name, value in self.plan.summary().items() if name != "tokens"},
            "tokens_of_all_steps": self.plan.tokens,
            "report": report.as_dict(),
        }


def prepare(config: TrainConfig, world: int, batching: Batching | None = None) -> PreparedData:
    """Read, check, split and plan.

    Args:
        config: of the run.
        world: number of processes.
        batching: default: packed.

    Raises:
        DollyError: of the kind that fits; nothing has been written.
    """
    if config.publish is not None:
        try:
            PublishSettings.from_recipe(config.publish)
        except SettingError as error:
            raise SettingError(f"publish: {error}") from None
    lora = read_lora(config.lora)
    base = locate(config.model, config.model_revision, SIDE_FILES)  # the weights when it is known that they fit
    network = read_config(base)
    tokenizer = read_tokenizer(base, add_keys=True)
    if lora:
        check_base(config.model, network, len(tokenizer.tokenizer))
    network.vocab_size = len(tokenizer.tokenizer)
    if config.max_length > network.max_position_embeddings:
        raise SettingError(
            f"max_length is {config.max_length}, but {config.model} has {network.max_position_embeddings} positions"
        )
    sources = read_records(config.dataset, config.columns, config.seed)
    checked = check_records(sources, tokenizer, config.max_length, config.strict, config.multi_turn, config.deduplicate)
    train, test = split(len(checked.ids), config.test_size, config.seed)
    checked = replace(checked, report=with_split(checked, test))
    examples, held_out = (
        [(checked.ids[i], checked.prompt_lengths[i]) for i in part]
        for part in (shown_in_an_epoch(train, checked.repeats), test)
    )
    held_out_records = [checked.records[i] for i in test]
    batching = batching or packed(config)
    lengths = [len(ids) for ids, _ in examples]
    plan = batching.plan(lengths, config.seed, config.epochs, config.global_batch_size, world, batching.size)
    if config.max_steps:
        plan = plan.first_steps(config.max_steps)
    return PreparedData(
        batching, base, network, tokenizer, sources.sha256, checked, examples, held_out, held_out_records, plan, lora
    )
