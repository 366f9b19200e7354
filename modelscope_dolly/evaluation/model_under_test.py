"""The model that is measured: any causal language model that transformers implements, from a directory or the hub.

No code of a model repository is run: trust_remote_code is off, and pickles are read with weights_only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.download import DEFAULT_REVISION, locate, repair_hint
from modelscope_dolly.checkpoint.weights import weight_files
from modelscope_dolly.errors import CheckpointError, HardwareError, one_line
from modelscope_dolly.files import file_kind, gigabytes, path_of, read_json
from modelscope_dolly.hardware import choose_device, choose_dtype, dtype_name, free_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class ModelUnderTest:
    """A model that was found and fits, its weights still on disk."""

    name: str  # hub id, or the last part of the directory's name
    revision: str | None  # of a hub id; None for a directory
    path: Path  # local directory
    files_sha256: str  # over names and digests of weights, configuration and tokenizer
    config: PretrainedConfig
    device: torch.device  # where the weights will be
    dtype: torch.dtype  # their number type there

    @property
    def device_name(self) -> str:
        """Name of the GPU, or kind of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def find_model(name: str, revision: str | None, device: str | None, dtype: str | None) -> ModelUnderTest:
    """Find a directory or hub id, check that it fits, and take the digest of its files; loads no weights.

    Raises:
        CheckpointError: not a model that can be read here. HardwareError: too large for the device, with the numbers.
    """
    target = choose_device(device).value
    path = locate(name, revision)
    files = weight_files(path)
    config = _config(path)
    parameters = _count_parameters(path, config)
    number_type = choose_dtype(target, dtype, 4 * parameters).value
    need, free = parameters * number_type.itemsize, free_memory(target)
    if need > free:
        raise HardwareError(
            f"{name}: {parameters / 1e9:.2f} billion weights need {gigabytes(need)} on {target} in "
            f"{dtype_name(number_type)}, {gigabytes(free)} are free; use --dtype bf16, or another device"
        )
    if file_kind(path_of("model", name)) == "directory":
        name, revision = path.resolve().name, None
    else:
        revision = revision or DEFAULT_REVISION
    try:
        digest = manifest.model_digest(path, files)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {repair_hint(path)}") from None
    return ModelUnderTest(name, revision, path, digest, config, target, number_type)


def _config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    file = path / "config.json"
    raw = read_json(file)
    try:
        config = AutoConfig.from_pretrained(path, **_LOCAL)
    except Exception as error:  # transformers validates with errors of several kinds
        raise CheckpointError(
            f"{file}: model_type {raw.get('model_type')!r} cannot be read ({one_line(error, 200)}); "
            "expected one that transformers implements itself, such as gpt_neox or gptj"
        ) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{file}: model_type {config.model_type!r} is no causal language model, such as gpt_neox")
    return config


def _count_parameters(path: Path, config: PretrainedConfig) -> int:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # sizes that contradict each other fail in many ways
        raise CheckpointError(f"{path / 'config.json'}: describes no network ({one_line(error, 200)})") from None
    return model.num_parameters()


def load_tokenizer(model: ModelUnderTest) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of the directory. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, **_LOCAL)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # of tokenizers, json, transformers
        raise CheckpointError(f"{model.path}: no usable tokenizer ({one_line(error, 200)})") from None
    if largest >= model.config.vocab_size:
        raise CheckpointError(
            f"{model.path}: the tokenizer has ids up to {largest}, vocab_size in config.json is "
            f"{model.config.vocab_size}; take both from one model"
        )
    return tokenizer


def load_network(model: ModelUnderTest) -> PreTrainedModel:
    """Weights on the device, in evaluation mode. Raises CheckpointError when a weight is missing or misshapen."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            model.path, config=model.config, dtype=model.dtype, device_map={"": model.device}, weights_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **_LOCAL,  # mismatches are reported below
        )  # fmt: skip
    except torch.cuda.OutOfMemoryError:
        raise HardwareError(f"{model.name}: the memory of {model.device} was full while loading") from None
    except Exception as error:  # of safetensors, pickle, transformers
        raise CheckpointError(f"{model.path}: cannot be loaded ({one_line(error, 200)})") from None
    finally:
        logging.set_verbosity(verbosity)
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        what = f"{missing[0]} is in no weight file" if missing else f"{mismatched[0]} has another shape than in config"
        raise CheckpointError(f"{model.path}: {what} ({len(missing)} missing, {len(mismatched)} of another shape)")
    return network.eval()
