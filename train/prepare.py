"""Everything about a run that can be known before its model is loaded: records, examples, and the batch plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import GPTNeoXConfig

from modelscope_dolly.checkpoint.config import read_config
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.checkpoint.tokenizer import read_tokenizer
from modelscope_dolly.errors import SettingError
from modelscope_dolly.prompt import DollyTokenizer
from train.config import TrainConfig
from train.data.batch_plan import Plan, packed_plan, padded_plan
from train.data.records import Checked, check_records, split
from train.data.sources import read_records
from train.planning.memory import Job
from train.training.lora import Lora, read_lora
from train.training.loss import Example, label_count


@dataclass(frozen=True)
class Prepared:
    """What every process of a run makes for itself, and makes alike.

    Attributes:
        base: directory of the base model.
        network: its configuration, with the vocabulary that training gives it.
        tokenizer: with the three keys.
        data_sha256: of the records as they were read.
        checked: the usable records and the report on all of them.
        examples, held_out: for training and for evaluation.
        plan: for this number of processes.
        lora: settings of the adapters, if any are trained.
    """

    base: Path
    network: GPTNeoXConfig
    tokenizer: DollyTokenizer
    data_sha256: str
    checked: Checked
    examples: list[Example]
    held_out: list[Example]
    plan: Plan
    lora: Lora | None

    @property
    def job(self) -> Job:
        """What the memory arithmetic wants to know."""
        return Job(self.network, self.plan.largest[0], lora_rank=self.lora.r if self.lora else 0)

    def summary(self) -> dict:
        """Figures for people, for `train.plan --json`, and for run.json."""
        report = self.checked.report.as_dict()
        return {
            "records": len(self.checked.ids) + sum(self.checked.report.dropped.values()),
            "records_kept": len(self.checked.ids),
            "records_held_out": len(self.held_out),
            "tokens": sum(len(ids) for ids in self.checked.ids),
            "label_tokens": label_count(list(zip(self.checked.ids, self.checked.prompt_lengths, strict=True))),
            **{name: value for name, value in self.plan.summary().items() if name != "tokens"},
            "tokens_of_all_steps": self.plan.tokens,
            "report": report,
        }


def prepare(config: TrainConfig, world: int) -> Prepared:
    """Read, check, split and plan.

    Raises:
        DollyError: of the kind that fits; nothing has been written.
    """
    lora = read_lora(config.lora)
    base = locate(config.model, config.model_revision)
    network = read_config(base)
    tokenizer = read_tokenizer(base, add_keys=True)
    network.vocab_size = len(tokenizer.tokenizer)
    if config.max_length > network.max_position_embeddings:
        raise SettingError(
            f"max_length is {config.max_length}, but {config.model} has {network.max_position_embeddings} positions"
        )
    source = read_records(config.dataset, config.columns)
    checked = check_records(source, tokenizer, config.max_length, config.strict)
    train_part, test_part = split(len(checked.ids), config.test_size, config.seed)
    examples, held_out = (
        [(checked.ids[i], checked.prompt_lengths[i]) for i in part] for part in (train_part, test_part)
    )
    plan = make_plan(config, [len(ids) for ids, _ in examples], world)
    return Prepared(base, network, tokenizer, source.sha256, checked, examples, held_out, plan, lora)


def make_plan(config: TrainConfig, lengths: Sequence[int], world: int) -> Plan:
    """The batch plan these settings ask for."""
    shared = (lengths, config.seed, config.epochs, config.global_batch_size, world)
    padded = config.batching == "padded"
    plan = padded_plan(*shared, config.padded_batch_size) if padded else packed_plan(*shared, config.tokens_per_batch)
    return plan.shortened(config.max_steps, lengths, padded) if config.max_steps else plan
