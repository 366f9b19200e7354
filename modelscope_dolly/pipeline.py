"""ModelScope's text-generation pipeline for dolly-v2: a thin adapter between its calls and DollyForTextGeneration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelscope.models.base import Model
from modelscope.msdatasets import MsDataset
from modelscope.outputs import OutputKeys
from modelscope.pipelines.base import Pipeline
from modelscope.pipelines.builder import PIPELINES
from modelscope.utils.constant import Frameworks

from modelscope_dolly import PIPELINE_TYPE, TASK
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.errors import SettingError, is_whole, shown, unknown_name
from modelscope_dolly.generation import DEFAULT_SLOTS, GenerationSettings, Update, parse_input
from modelscope_dolly.model import MODEL_OPTIONS, DollyForTextGeneration

_CONFIGURATION = Path(__file__).with_name("configuration.json")
_GENERATION_OPTIONS = tuple(GenerationSettings.__dataclass_fields__)


@PIPELINES.register_module(TASK, module_name=PIPELINE_TYPE, force=True)
class DollyTextGenerationPipeline(Pipeline):
    """Instruction in, `{"text": answer}` out.

    Args:
        model: a checkpoint directory, or a loaded DollyForTextGeneration.
        device: cpu, cuda:N, gpu (first CUDA device, else CPU) or mps.
        device_map: "auto" to spread a model over several GPUs.
        options: dtype, verify, quantize, threads, draft (see DollyForTextGeneration), and any generation keyword as
            this pipeline's default.
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

    def __call__(self, input: Any, *args: Any, batch_size: int | None = None, **keywords: Any) -> Any:
        """Answer one input, a list, or an MsDataset.

        Args:
            input: a text; {"instruction": ..., "context": ...}; a list of either; or an MsDataset with such columns.
            batch_size: inputs answered at the same time (default 8); it changes the speed, not the answers.
            keywords: see GenerationSettings.

        Returns:
            {"text": answer}; a list of it for num_return_sequences > 1; a list of these for a list; a generator of
            these for an MsDataset.

        Raises:
            PromptError, SettingError.
        """
        if args:
            raise SettingError("give everything but the input by keyword, for instance max_new_tokens=64")
        if batch_size is not None and not is_whole(batch_size, 1, 2**31 - 1):
            raise SettingError(f"batch_size is {shown(batch_size)}, it must be a whole number of at least 1")
        settings = self.settings.updated(keywords)
        slots = int(batch_size or DEFAULT_SLOTS)
        if isinstance(input, MsDataset):
            return self._rows(input, settings, slots)
        inputs = input if isinstance(input, list) else [input]
        answers = [_output(updates) for updates in self.model.generate(inputs, settings, slots)]
        return answers if isinstance(input, list) else answers[0]

    def stream_generate(self, input: Any, **keywords: Any) -> Iterator[dict[str, str]]:
        """Yield {"text": the answer so far} as it grows; the last one is the whole answer."""
        settings = self.settings.updated(keywords)
        if settings.num_return_sequences != 1:
            raise SettingError("a stream is one answer: num_return_sequences must be 1")
        updates = self.model.stream(input, settings)
        return ({OutputKeys.TEXT: update.text} for update in updates)

    def _rows(self, rows: MsDataset, settings: GenerationSettings, slots: int) -> Iterator[Any]:
        waiting = []
        for row in rows:
            waiting.append(parse_input(row, ignore_unknown=True))
            if len(waiting) == slots:
                yield from map(_output, self.model.generate(waiting, settings, slots))
                waiting = []
        yield from map(_output, self.model.generate(waiting, settings, slots))

    def _get_framework(self) -> str:
        """For the base class, which would read it from a configuration.json that may not be there."""
        return Frameworks.torch

    def postprocess(self, inputs: dict, **parameters: Any) -> dict:
        """Required by the base class; outputs are complete already."""
        return inputs


def _unused(value: Any) -> Any:
    """A preprocessor, so that the base class does not look for one in the checkpoint."""
    return value


def _output(updates: list[Update]) -> dict[str, str] | list[dict[str, str]]:
    texts = [{OutputKeys.TEXT: update.text} for update in updates]
    return texts[0] if len(texts) == 1 else texts


def dolly_pipeline(
    model: str, model_revision: str | None = None, device: str | None = None, **options: Any
) -> DollyTextGenerationPipeline:
    """The pipeline for any dolly-v2 directory or hub id, whatever its configuration.json says, or without one.

    For repositories that ModelScope's `pipeline()` refuses or cannot place: those that demand remote code, as the 2023
    uploads do, and plain Hugging Face directories. The snapshot is downloaded without any .py file and no code of it
    runs, so no trust flag is needed.

    Args:
        model: a directory or a hub id.
        model_revision: a tag or branch of the hub id (default: master).
        device: as for `pipeline()`.
        options: as for DollyTextGenerationPipeline.

    Raises:
        DollyError: of the kind that fits.
    """
    return DollyTextGenerationPipeline(str(locate(model, model_revision)), device=device, **options)
