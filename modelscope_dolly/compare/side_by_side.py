"""Two models over the same records: what each answered, and which of them finds the answers of people likelier."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modelscope_dolly.compare.answers import ModelAnswer, ModelAnswers, answer_all
from modelscope_dolly.compare.held_out import HeldOutRecord
from modelscope_dolly.compare.paired_bootstrap import Interval, paired_interval
from modelscope_dolly.errors import SettingError


@dataclass(frozen=True)
class ComparedModel:
    """What to load, and what to call it: a short name for tables and the page."""

    model: str
    revision: str | None
    name: str


@dataclass(frozen=True)
class Comparison:
    """Two models on the records that both had time for.

    Attributes:
        names: of the two.
        models: what they are, with all that they answered.
        records: those that both answered, in order.
        wanted: how many there were.
    """

    names: tuple[str, str]
    models: tuple[ModelAnswers, ModelAnswers]
    records: list[HeldOutRecord]
    wanted: int

    @property
    def pairs(self) -> list[tuple[ModelAnswer, ModelAnswer]]:
        return list(zip(*(model.answers[: len(self.records)] for model in self.models), strict=True))

    @property
    def scored(self) -> list[tuple[ModelAnswer, ModelAnswer]]:
        """Those with a loss of both models."""
        return [pair for pair in self.pairs if None not in (pair[0].loss, pair[1].loss)]

    @property
    def same_tokens(self) -> bool:
        """Whether both tokenizers give the same ids; else losses per token cannot be compared."""
        return all(first.ids == second.ids for first, second in self.scored)

    def loss(self, which: int) -> float | None:
        """Mean per token of the people's answers, in nats; None where there is none."""
        tokens = sum(len(pair[which].ids) for pair in self.scored)
        return math.fsum(pair[which].loss for pair in self.scored) / tokens if tokens else None

    @property
    def interval(self) -> Interval | None:
        """Second minus first; None without losses that can be compared."""
        if not self.scored or not self.same_tokens:
            return None
        first, second = ([pair[which].loss for pair in self.scored] for which in (0, 1))
        return paired_interval(first, second, [len(pair[0].ids) for pair in self.scored])

    @property
    def wins(self) -> tuple[int, int] | None:
        """On how many records each of them has the lower loss."""
        if not self.scored or not self.same_tokens:
            return None
        lower = [pair[1].loss - pair[0].loss for pair in self.scored]
        return sum(value > 0 for value in lower), sum(value < 0 for value in lower)

    @property
    def digest(self) -> str:
        """Of all that is shown, so that marks of one page are not taken for those of another."""
        content = [self.names, [(record.instruction, record.context) for record in self.records],
                   [(first.text, second.text) for first, second in self.pairs]]  # fmt: skip
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def compare(
    first: ComparedModel,
    second: ComparedModel,
    records: Sequence[HeldOutRecord],
    max_new_tokens: int = 256,
    minutes: float | None = None,
    report: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Comparison:
    """Let both answer the records, one model after the other, so that one is in memory.

    Args:
        first, second: the models.
        records: to be answered, at least one.
        max_new_tokens: of each answer.
        minutes: for both together, loading included; when they are over, the batch of records at work is the last. The
            records that both had time for are compared.
        report: takes a line about the progress.
        options: device, dtype, quantize, threads; see load.load.

    Raises:
        DollyError: a model cannot be loaded, or there is no record.
    """
    if not records:
        raise SettingError("there are no records to compare two models on")
    begin, wanted = time.monotonic(), len(records)
    seconds = math.inf if minutes is None else 60 * minutes
    made = []
    for number, one in enumerate((first, second), 1):
        deadline = begin + seconds * number / 2
        made.append(answer_all(one.model, records, max_new_tokens, deadline, report, one.revision, **options))
        records = records[: len(made[0].answers)]
    common = min(len(model.answers) for model in made)
    return Comparison((first.name, second.name), (made[0], made[1]), list(records[:common]), wanted)
