"""DollyForTextGeneration: a loaded dolly-v2 as ModelScope's `Model.from_pretrained` returns it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from modelscope.models.base import TorchModel
from modelscope.models.builder import MODELS

from modelscope_dolly import MODEL_TYPE, TASK
from modelscope_dolly.engine.sequence import TokenLogprob
from modelscope_dolly.errors import SettingError, unknown_name
from modelscope_dolly.files import path_of
from modelscope_dolly.generation import DEFAULT_SLOTS, GenerationSettings, Prompt, Update, parse_input
from modelscope_dolly.load import load

MODEL_OPTIONS = ("dtype", "torch_dtype", "verify", "quantize", "threads", "draft", "adapter", "slots")


@MODELS.register_module(TASK, module_name=MODEL_TYPE, force=True)
class DollyForTextGeneration(TorchModel):
    """A loaded dolly-v2.

    Args:
        model_dir: a checkpoint directory.
        device, dtype, device_map, verify, quantize, threads, draft, adapter, slots: see load.load.
        torch_dtype: another name of dtype.
        trust_remote_code: accepted because ModelScope passes it; no code of a repository is ever run.

    Raises:
        CheckpointError, HardwareError, SettingError.
    """

    def __init__(
        self,
        model_dir: str,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | dict | None = None,
        verify: bool | str = True,
        quantize: str | None = None,
        threads: int | None = None,
        draft: str | None = None,
        adapter: str | None = None,
        slots: int | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ):
        if unknown:
            raise SettingError(
                unknown_name("model option", next(iter(unknown)), ("device", "device_map", *MODEL_OPTIONS))
            )
        super().__init__(path_of("model", model_dir))
        number = dtype if dtype is not None else torch_dtype
        loaded = load(
            model_dir, device, number, device_map, verify, quantize, threads, draft, slots=slots, adapter=adapter
        )
        self.checkpoint, self.net, self.device = loaded.checkpoint, loaded.net, loaded.device
        self.dtype, self.text_generator = loaded.dtype, loaded.text_generator
        self.tokenizer = loaded.checkpoint.tokenizer.tokenizer

    def generate(
        self, inputs: Sequence[Any], settings: GenerationSettings | None = None, slots: int = DEFAULT_SLOTS
    ) -> list[list[Update]]:
        """Answers to several inputs (texts or dicts): for each input its `num_return_sequences` final updates."""
        return self.text_generator.generate(
            [_as_prompt(value) for value in inputs], settings or GenerationSettings(), slots
        )

    def stream(self, value: Any, settings: GenerationSettings | None = None) -> Iterator[Update]:
        """The updates of one answer as it grows."""
        return self.text_generator.stream([_as_prompt(value)], settings or GenerationSettings(), slots=1)

    def score(
        self, inputs: Sequence[Any], answers: Sequence[str], top: int = 0, end: bool = False, slots: int = DEFAULT_SLOTS
    ) -> list[list[TokenLogprob]]:
        """How likely each given answer is: the log-probability of each of its tokens. Nothing is generated.

        Args:
            inputs: texts or dicts, one for each answer.
            answers: to be scored.
            top: give so many of the likeliest tokens in each place, too.
            end: score the end of the answer, too, as it is learned in training.
            slots: scored at the same time.

        Raises:
            PromptError: an answer is empty, or does not fit the window.
            SettingError: there are not as many answers as inputs.
        """
        if len(inputs) != len(answers):
            raise SettingError(f"there are {len(inputs)} inputs and {len(answers)} answers: give one for each")
        pairs = [(_as_prompt(value), answer) for value, answer in zip(inputs, answers, strict=True)]
        encoded = [self.text_generator.encode_answer(prompt, answer, end) for prompt, answer in pairs]
        return self.text_generator.scores(encoded, top, slots)

    def forward(self, inputs: Any, **keywords: Any) -> dict[str, Any]:
        """One input -> {"text": answer}, the way a ModelScope model is called; more as in a pipeline."""
        settings = GenerationSettings().updated(keywords)
        if settings.num_return_sequences != 1:
            raise SettingError("a model call is one answer: num_return_sequences must be 1")
        [[update]] = self.generate([inputs], settings, slots=1)
        return {"text": update.text, **self.text_generator.details(update)}


def _as_prompt(value: Any) -> Prompt:
    return value if isinstance(value, Prompt) else parse_input(value)
