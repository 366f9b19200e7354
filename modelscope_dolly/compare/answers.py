"""What one model makes of the records: its own greedy answers, and how likely it finds those of people."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.compare.held_out import HeldOutRecord
from modelscope_dolly.errors import HardwareError, PromptError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.hardware import dtype_name
from modelscope_dolly.load import Dolly, load

#: Records that are answered together, after which the time is looked at.
TOGETHER = 8


@dataclass(frozen=True)
class ModelAnswer:
    """One record, as one model sees it.

    Attributes:
        text: its greedy answer; "" with a `problem`, where the prompt leaves no room for one.
        finish_reason: "stop" or "length".
        new_tokens: of the answer.
        loss: summed over the tokens of the person's answer and its end, in nats; None without one, or where it does
            not fit the window.
        ids: these tokens, by which two tokenizers are told apart.
    """

    text: str
    finish_reason: str | None
    new_tokens: int
    loss: float | None
    ids: tuple[int, ...]
    problem: str | None = None


@dataclass(frozen=True)
class ModelAnswers:
    """The records that a model had time for, in order, with what it is."""

    model: str
    dtype: str
    device: str
    answers: list[ModelAnswer]
    seconds: float


def answer_all(
    model: str,
    records: Sequence[HeldOutRecord],
    max_new_tokens: int,
    deadline: float,
    report: Callable[[str], None],
    revision: str | None = None,
    **options: Any,
) -> ModelAnswers:
    """Load a model, let it answer until the deadline, and give its memory back.

    Args:
        model: directory or hub id. The tokenizer of a base model gets the three keys that it lacks, as in training.
        records: to be answered.
        max_new_tokens: of each answer.
        deadline: of time.monotonic(); at least one batch of records is answered.
        report: takes a line about the progress.
        revision: of a hub id.
        options: device, dtype, quantize, threads; see load.load.

    Raises:
        DollyError: it cannot be loaded.
    """
    start = time.monotonic()
    try:
        dolly = load(locate(model, revision), add_keys=True, **options)
        report(f"{model}: loaded in {time.monotonic() - start:.1f} s")
        answers: list[ModelAnswer] = []
        for begin in range(0, len(records), TOGETHER):
            answers += _answer(dolly, records[begin : begin + TOGETHER], max_new_tokens)
            report(f"{model}: {len(answers)} of {len(records)} records")
            if time.monotonic() > deadline:
                break
        name = str(dolly.device) if dolly.device.type != "cuda" else torch.cuda.get_device_name(dolly.device)
        return ModelAnswers(model, dtype_name(dolly.dtype), name, answers, time.monotonic() - start)
    except torch.OutOfMemoryError:
        raise HardwareError(f"{model}: the memory of the GPU was full; use --dtype bf16, or --device cpu") from None
    finally:
        dolly = None  # the memory is for the other model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _answer(dolly: Dolly, records: Sequence[HeldOutRecord], max_new_tokens: int) -> Iterator[ModelAnswer]:
    """The answers to some records, and the losses of those that they have."""
    generator = dolly.text_generator
    settings = GenerationSettings().updated({"do_sample": False, "max_new_tokens": max_new_tokens})
    prompts = [Prompt(record.instruction, record.context or None) for record in records]
    problems: dict[int, str] = {}
    for number, prompt in enumerate(prompts):
        try:
            generator.fit(prompt, settings)
        except PromptError as error:
            problems[number] = str(error)
    fitting = [number for number in range(len(prompts)) if number not in problems]
    made = generator.generate([prompts[number] for number in fitting], settings, TOGETHER)
    answers = dict(zip(fitting, (update for [update] in made), strict=True))
    for number, (loss, ids) in enumerate(_losses(dolly, records)):
        if number in problems:
            yield ModelAnswer("", None, 0, loss, ids, problems[number])
        else:
            update = answers[number]
            yield ModelAnswer(update.text, update.finish_reason, update.new_tokens, loss, ids)


def _losses(dolly: Dolly, records: Sequence[HeldOutRecord]) -> list[tuple[float | None, tuple[int, ...]]]:
    """Of the people's answers, as the training counts them, their ends included; with the ids of these tokens."""
    generator, tokenizer = dolly.text_generator, dolly.checkpoint.tokenizer
    texts = [tokenizer.encode_example(record.instruction, record.context, record.response) for record in records]
    fitting = [number for number, (record, (ids, _)) in enumerate(zip(records, texts, strict=True))
               if record.response and len(ids) <= generator.engine.window]  # fmt: skip
    scores = dict(zip(fitting, generator.scores([texts[number] for number in fitting], slots=TOGETHER), strict=True))
    return [
        (-math.fsum(token.logprob for token in scores[number]) if number in scores else None, tuple(ids[begin:]))
        for number, (ids, begin) in enumerate(texts)
    ]
