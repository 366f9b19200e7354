"""ModelScope's text-generation pipeline for dolly-v2: a thin adapter between its calls and DollyForTextGeneration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

from modelscope.models.base import Model
from modelscope.msdatasets import MsDataset
from modelscope.pipelines.base import Pipeline
from modelscope.pipelines.builder import PIPELINES
from modelscope.utils.constant import Frameworks

from modelscope_dolly import CHAT_TASK, PIPELINE_TYPE, TASK
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.errors import SettingError, is_whole, shown, unknown_name
from modelscope_dolly.generation import DEFAULT_SLOTS, GenerationSettings, Prompt, Update, parse_input
from modelscope_dolly.model import MODEL_OPTIONS, DollyForTextGeneration
from modelscope_dolly.task_shapes import as_input, message, output, refuse_keywords

_CONFIGURATION = Path(__file__).with_name("configuration.json")
_GENERATION_OPTIONS = tuple(GenerationSettings.__dataclass_fields__)


@PIPELINES.register_module(TASK, module_name=PIPELINE_TYPE, force=True)
class DollyTextGenerationPipeline(Pipeline):
    """Instruction in, `{"text": answer}` out; conversation in, `{"message": {"role": ..., "content": answer}}` out.

    Args:
        model: a checkpoint directory, or a loaded DollyForTextGeneration.
        device: cpu, cuda:N, or gpu (first CUDA device, else CPU).
        device_map: "auto" to spread a model over several GPUs.
        options: dtype, verify, quantize, threads, draft, adapter, slots (see DollyForTextGeneration), and any
            generation keyword as this pipeline's default.
        trust_remote_code: accepted because ModelScope passes it; no code of a repository is ever run.

    Raises:
        DollyError: of the kind that fits; ModelScope puts this class's name before the message.
    """

    def __init__(
        self,
        model: str | Model,
        preprocessor: Any = None,
        device: str | None = None,
        device_map: str | dict | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ):
        refuse_keywords(options)
        for name in options:
            if name not in MODEL_OPTIONS + _GENERATION_OPTIONS:
                raise SettingError(unknown_name("pipeline option", name, MODEL_OPTIONS + _GENERATION_OPTIONS))
        defaults = {name: options.pop(name) for name in _GENERATION_OPTIONS if name in options}
        self.settings = GenerationSettings().updated(defaults)
        if not isinstance(model, Model):
            model = DollyForTextGeneration(model, device=device, device_map=device_map, **options)
        if not isinstance(model, DollyForTextGeneration):
            raise SettingError(f"model must be a directory or a DollyForTextGeneration, found {type(model).__name__}")
        # The base class wants a configuration.json, which plain Hugging Face directories lack; ours serves for all.
        # Its own ideas of device and placement are not used: the weights lie where they belong already.
        super().__init__(config_file=str(_CONFIGURATION), model=model, preprocessor=_unused, device="cpu")
        self.device_name, self.device = str(model.device), model.device
        self._model_prepare = True
        self.tokenizer = model.tokenizer

    # ModelScope's deploy checker reads this signature from the source. It cannot take keyword-only parameters, nor
    # annotations like `str | None`.
    def __call__(
        self,
        input: Any,
        context: Optional[str] = None,  # noqa: UP045
        batch_size: Optional[int] = None,  # noqa: UP045
        **keywords: Any,
    ) -> Any:
        """Answer one input, a list, or an MsDataset.

        Args:
            input: a text; {"instruction": ..., "context": ...}; {"messages": [{"role": ..., "content": ...}, ...]} or
                that list of messages alone; a list of any of these; or an MsDataset with such columns.
            context: for every input that has none of its own.
            batch_size: inputs answered at the same time (default 8); it changes the speed, not the answers.
            keywords: see GenerationSettings.

        Returns:
            {"text": answer}, for a conversation {"message": {"role": "assistant", "content": answer}}; a list of it for
            num_return_sequences > 1; a list of these for a list; a generator of these for an MsDataset. With logprobs=N
            each has "logprobs", too: for each token {"id": ..., "token": its text, "logprob": ..., "top": [the same of
            the N likeliest, likeliest first]}; with choices=[...] "choices": for each {"text": ..., "logprob": mean of
            its tokens, "probability": ...}.

        Raises:
            PromptError, SettingError.
        """
        slots = _slots(batch_size)
        settings = self._settings(keywords)
        if isinstance(input, MsDataset):
            return self._rows(input, context, settings, slots)
        value = as_input(input)
        many = isinstance(value, list)
        inputs = [as_input(each) for each in value] if many else [value]
        prompts = [parse_input(each, context=context) for each in inputs]
        answers = list(self._answers(inputs, prompts, settings, slots))
        return answers if many else answers[0]

    def stream_generate(self, input: Any, context: str | None = None, **keywords: Any) -> Iterator[dict[str, Any]]:
        """Yield what a call returns, with the answer so far, as it grows; the last one is the whole answer."""
        settings = self._settings(keywords)
        if settings.num_return_sequences != 1:
            raise SettingError("a stream is one answer: num_return_sequences must be 1")
        value = as_input(input)
        updates = self.model.stream(parse_input(value, context=context), settings)
        return (self._output(value, update) for update in updates)

    # Not as a preprocessor of the base class: a score has other parameters than an answer.
    def score(
        self,
        input: Any,
        answer: str | list[str],
        context: str | None = None,
        top: int = 0,
        end: bool = False,
        batch_size: int | None = None,
    ) -> Any:
        """How likely a given answer is. Nothing is generated.

        Args:
            input: as of a call; a list of inputs for a list of answers.
            answer: to be scored.
            context: as of a call.
            top: give so many of the likeliest tokens in each place, too.
            end: score the end of the answer, too, as it is learned in training.
            batch_size: answers scored at the same time (default 8).

        Returns:
            {"logprob": of the whole answer, "perplexity": exp(-mean per token), "logprobs": as of a call}; a list of it
            for a list of answers.

        Raises:
            PromptError, SettingError.
        """
        slots = _slots(batch_size)
        many = isinstance(answer, (list, tuple))
        inputs = list(input) if many and isinstance(input, (list, tuple)) else [input]
        prompts = [parse_input(as_input(each), context=context) for each in inputs]
        scores = self.model.score(prompts, answer if many else [answer], top, end, slots)
        outputs = [self.model.text_generator.score_dict(score) for score in scores]
        return outputs if many else outputs[0]

    def _settings(self, keywords: dict[str, Any]) -> GenerationSettings:
        refuse_keywords(keywords)
        return self.settings.updated(keywords)

    def _rows(self, rows: MsDataset, context: str | None, settings: GenerationSettings, slots: int) -> Iterator[Any]:
        waiting: list[Any] = []
        prompts: list[Prompt] = []
        for row in rows:
            waiting.append(row)
            prompts.append(parse_input(row, ignore_unknown=True, context=context))
            if len(waiting) == slots:
                yield from self._answers(waiting, prompts, settings, slots)
                waiting, prompts = [], []
        yield from self._answers(waiting, prompts, settings, slots)

    def _answers(
        self, inputs: Iterable[Any], prompts: list[Prompt], settings: GenerationSettings, slots: int
    ) -> Iterator[Any]:
        for value, updates in zip(inputs, self.model.generate(prompts, settings, slots), strict=True):
            outputs = [self._output(value, update) for update in updates]
            yield outputs[0] if len(outputs) == 1 else outputs

    def _output(self, value: Any, update: Update) -> dict[str, Any]:
        """An answer in the form that belongs to its input."""
        return {**output(value, update.text), **self.model.text_generator.details(update)}

    def _get_framework(self) -> str:
        """For the base class, which would read it from a configuration.json that may not be there."""
        return Frameworks.torch

    def postprocess(self, inputs: dict, **parameters: Any) -> dict:
        """Required by the base class; outputs are complete already."""
        return inputs


def _slots(batch_size: int | None) -> int:
    """Raises SettingError."""
    if batch_size is not None and not is_whole(batch_size, 1, 2**31 - 1):
        raise SettingError(f"batch_size is {shown(batch_size)}, it must be a whole number of at least 1")
    return int(batch_size or DEFAULT_SLOTS)


def _unused(value: Any) -> Any:
    """A preprocessor, so that the base class does not look for one in the checkpoint."""
    return value


@PIPELINES.register_module(CHAT_TASK, module_name=PIPELINE_TYPE, force=True)
class DollyChatPipeline(DollyTextGenerationPipeline):
    """The same pipeline for Tasks.chat: each answer is {"message": {"role": "assistant", "content": answer}}."""

    def _output(self, value: Any, update: Update) -> dict[str, Any]:
        return {**message(update.text), **self.model.text_generator.details(update)}


def dolly_pipeline(
    model: str, model_revision: str | None = None, device: str | None = None, **options: Any
) -> DollyTextGenerationPipeline:
    """The pipeline for any dolly-v2 directory or hub id, whatever its configuration.json says, or without one.

    For what ModelScope's `pipeline()` does not recognise, such as plain Hugging Face directories, and where the hub
    cannot be reached. The snapshot is downloaded without any .py file and no code of it runs, so no trust flag is
    needed.

    Args:
        model: a directory or a hub id.
        model_revision: a tag or branch of the hub id (default: master).
        device: as for `pipeline()`.
        options: as for DollyTextGenerationPipeline.

    Raises:
        DollyError: of the kind that fits.
    """
    return DollyTextGenerationPipeline(str(locate(model, model_revision)), device=device, **options)
