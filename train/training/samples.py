"""`samples`: a few instructions, answered with the weights as they are at every evaluation.

Decoding is greedy, through the forward pass that trains and evaluates: prompts and what has been answered are laid end
to end as one packed pass, and the next token of each is the likeliest. There is no key/value cache, so a token costs a
pass over all before it: four answers of 64 tokens are as much work as evaluating about 200 records. In return the one
way serves ZeRO 0 to 3 (where the weights are sharded, gathered layer by layer as for any pass), adapters, and weights
of fewer bits, and shows what the loss is measured on. The engine would need a copy of the weights in one place.

Each process decodes its part of the samples; all take the same number of passes, because with ZeRO 3 each needs every
process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from modelscope_dolly.errors import SettingError
from modelscope_dolly.prompt import DollyTokenizer
from train.config import TrainConfig
from train.data.collate import packed_inputs
from train.data.validate import TrainingRecord
from train.distributed import gather
from train.training.checkpoints import writing
from train.training.report import cut_metrics

SAMPLES_FILE = "samples.jsonl"
TAG = "samples"
#: Computes the logits [rows, V] behind some tokens of a pass: (inputs of packed_inputs, places [rows]) -> logits.
NextTokenLogits = Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SampleAnswer:
    """An answer after so many optimizer steps; `ended`: by itself, not by its length."""

    step: int
    instruction: str
    context: str
    answer: str
    ended: bool


class Samples:
    """The samples of a run.

    Args:
        config: of the run.
        tokenizer: with the three keys.
        held_out: records that a number of samples takes the first of.

    Raises:
        SettingError: a prompt leaves no room for its answer, or fewer records are held out than samples wanted.
    """

    def __init__(self, config: TrainConfig, tokenizer: DollyTokenizer, held_out: Sequence[TrainingRecord]):
        self.tokenizer, self.limit = tokenizer, config.sample_tokens
        self.path = Path(config.output_dir) / SAMPLES_FILE
        self.prompts = _prompts(config.samples, held_out)
        self.ids = [tokenizer.encode(instruction, context or None) for instruction, context in self.prompts]
        for (instruction, _), ids in zip(self.prompts, self.ids, strict=True):
            if len(ids) + self.limit > config.max_length:
                raise SettingError(
                    f"a sample of {len(ids)} tokens ({instruction[:40]!r}...) and {self.limit} sample_tokens are more "
                    f"than max_length {config.max_length}; shorten it, or lower sample_tokens"
                )

    def answer(
        self, logits: NextTokenLogits, step: int, rank: int, world: int, device: torch.device
    ) -> list[SampleAnswer]:
        """Every sample's answer, in every process.

        Args:
            logits: of the network, to be called the same number of times in all processes.
            step: for the record.
            rank, world: this process and their number.
            device: of the network.
        """
        mine = list(range(len(self.ids)))[rank::world]
        answers: dict[int, list[int]] = {index: [] for index in mine}
        stop = self.tokenizer.control.stop
        for _ in range(self.limit):
            open_ones = [index for index in mine if not answers[index] or answers[index][-1] not in stop]
            if not _anywhere(bool(open_ones), world, device):
                break
            # A process that is done takes part with a single token.
            rows = [[*self.ids[index], *answers[index]] for index in open_ones] or [[self.tokenizer.control.eos]]
            inputs = packed_inputs(rows, device)
            best = logits(inputs, inputs["cu_seq_lens"][1:].long() - 1).argmax(-1).tolist()
            for index, token in zip(open_ones, best, strict=False):
                answers[index].append(token)
        texts = {str(index): json.dumps([self._text(ids), bool(ids) and ids[-1] in stop])
                 for index, ids in answers.items()}  # fmt: skip
        found = gather(texts)
        return [
            SampleAnswer(step, *prompt, *json.loads(found[str(index)])) for index, prompt in enumerate(self.prompts)
        ]

    def start(self, step: int) -> None:
        """Cut the file to the step that a run resumes from."""
        with writing(self.path):
            cut_metrics(self.path, step)

    def record(self, answers: Sequence[SampleAnswer]) -> None:
        """Append to samples.jsonl."""
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode([id for id in ids if id not in self.tokenizer.control.stop])


def _anywhere(here: bool, world: int, device: torch.device) -> bool:
    """Whether it is true in any process."""
    if world == 1:
        return here
    flag = torch.tensor(float(here), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _prompts(samples: int | list, held_out: Sequence[TrainingRecord]) -> list[tuple[str, str]]:
    """(instruction, context) of each."""
    if isinstance(samples, int):
        if samples > len(held_out):
            raise SettingError(f"samples is {samples}, but {len(held_out)} records are held out (test_size)")
        return [(record.instruction, record.context) for record in held_out[:samples]]
    given = [{"instruction": sample} if isinstance(sample, str) else sample for sample in samples]
    return [(sample["instruction"], sample.get("context", "")) for sample in given]


def as_text(answers: Sequence[SampleAnswer]) -> str:
    """Markdown, for the places that show it."""
    return "\n\n".join(f"**{_flat(one.instruction)}**\n\n{one.answer or '(nothing)'}" for one in answers)


def lines(answers: Sequence[SampleAnswer], length: int = 160) -> list[str]:
    """For a terminal: a line for each."""
    return [f"  {_flat(one.instruction)[:60]} -> {_flat(one.answer)[:length]}" for one in answers]


def _flat(text: str) -> str:
    return " ".join(text.split())


def send(answers: Sequence[SampleAnswer], callbacks: Sequence[Any]) -> None:
    """To the reporters that the Trainer has set up, as text. Each is recognised by what it holds while it is at work.

    TensorBoard's writer, SwanLab's and W&B's module: transformers/integrations/integration_utils.py. Their on_log
    takes numbers alone.
    """
    step, text = answers[0].step, as_text(answers)
    for callback in callbacks:
        if writer := getattr(callback, "tb_writer", None):
            writer.add_text(TAG, text, step)
        elif (swanlab := getattr(callback, "_swanlab", None)) and swanlab.get_run() is not None:
            swanlab.log({TAG: [swanlab.Text(one.answer, caption=one.instruction[:80]) for one in answers]}, step=step)
        elif (wandb := getattr(callback, "_wandb", None)) and wandb.run is not None:
            rows = [[one.step, one.instruction, one.context, one.answer] for one in answers]
            table = wandb.Table(columns=["step", "instruction", "context", "answer"], data=rows)
            wandb.log({TAG: table, "train/global_step": step})
