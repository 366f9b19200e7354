"""The model that is measured: any causal language model that transformers implements, from a directory or the hub.

No code of a model repository is run: trust_remote_code is off, and pickles are read with weights_only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.reader import DEFAULT_REVISION, locate, repair_hint
from modelscope_dolly.checkpoint.weights import weight_files
from modelscope_dolly.errors import CheckpointError, HardwareError, one_line
from modelscope_dolly.hardware import choose_device, choose_dtype, dtype_name, free_memory, gigabytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """A model that is known and fits, its weights still on disk.

    Attributes:
        name: hub id, or the last part of the directory's name.
        revision: of a hub id; None for a directory.
        path: local directory.
        files_sha256: digest over names and digests of weights, configuration and tokenizer.
        config: transformers' configuration.
        device, dtype: where and in which number type the weights will be.
    """

    name: str
    revision: str | None
    path: Path
    files_sha256: str
    config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def device_name(self) -> str:
        """Name of the GPU, or kind of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def examine(model: str, revision: str | None, device: str | None, dtype: str | None) -> Subject:
    """Find the model, look whether it fits, and take the digest of its files; reads no weights into memory.

    Raises:
        CheckpointError: not a model that can be read here. HardwareError: too large for the device, with the numbers.
    """
    where = choose_device(device).value
    path = locate(model, revision)
    files = weight_files(path)
    config = _config(path)
    parameters = _count_parameters(path, config)
    number = choose_dtype(where, dtype, 4 * parameters).value
    need, free = parameters * number.itemsize, free_memory(where)
    if need > free:
        raise HardwareError(
            f"{model}: {parameters / 1e9:.2f} billion weights need {gigabytes(need)} on {where} in "
            f"{dtype_name(number)}, {gigabytes(free)} are free; use --dtype bf16, or another device"
        )
    try:
        digest = manifest.model_digest(path, files)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {repair_hint(path)}") from None
    is_directory = Path(model).expanduser().is_dir()
    name = path.resolve().name if is_directory else model
    hub_revision = None if is_directory else revision or DEFAULT_REVISION
    return Subject(name, hub_revision, path, digest, config, where, number)


def _config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    raw = manifest.read_json(path / "config.json")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers validates with errors of several kinds
        raise CheckpointError(
            f"{path / 'config.json'}: model_type {raw.get('model_type')!r} cannot be read ({one_line(error, 200)}); "
            "expected one that transformers implements itself, such as gpt_neox or gptj"
        ) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{path / 'config.json'}: model_type {config.model_type!r} is no causal language model, such as gpt_neox"
        )
    return config


def _count_parameters(path: Path, config: PretrainedConfig) -> int:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a size that does not fit another shows in many ways
        raise CheckpointError(f"{path / 'config.json'}: describes no network ({one_line(error, 200)})") from None
    return model.num_parameters()


def load_tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of the directory. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(subject.path, trust_remote_code=False, local_files_only=True)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # of tokenizers, json, transformers
        raise CheckpointError(f"{subject.path}: no usable tokenizer ({one_line(error, 200)})") from None
    if largest >= subject.config.vocab_size:
        raise CheckpointError(
            f"{subject.path}: the tokenizer has ids up to {largest}, vocab_size in config.json is "
            f"{subject.config.vocab_size}; take both from one model"
        )
    return tokenizer


def load_model(subject: Subject) -> PreTrainedModel:
    """Weights on the device, in evaluation mode. Raises CheckpointError when a weight is missing or misshapen."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, "weights_only": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            subject.path,
            config=subject.config,
            dtype=subject.dtype,
            device_map={"": subject.device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in one line, instead of in a table
            **options,
        )
    except torch.cuda.OutOfMemoryError:
        raise HardwareError(f"{subject.name}: the memory of {subject.device} was full while loading") from None
    except Exception as error:  # of safetensors, pickle, transformers
        raise CheckpointError(f"{subject.path}: cannot be loaded ({one_line(error, 200)})") from None
    finally:
        logging.set_verbosity(verbosity)
    missing, mismatched = sorted(found["missing_keys"]), sorted(map(str, found["mismatched_keys"]))
    if missing or mismatched:
        what = f"{missing[0]} is in no weight file" if missing else f"{mismatched[0]} has another shape than in config"
        raise CheckpointError(f"{subject.path}: {what} ({len(missing)} missing, {len(mismatched)} of another shape)")
    return model.eval()
