"""Open a checkpoint directory: configuration, tokenizer and headers of the weights, checked. No code from it is run."""

from __future__ import annotations

import logging
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.config import read_config, read_quantization
from modelscope_dolly.checkpoint.download import repair_hint
from modelscope_dolly.checkpoint.tokenizer import check_vocabulary, read_tokenizer
from modelscope_dolly.checkpoint.weights import TensorLocations, locate_tensors, weight_files
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.files import file_kind, path_of
from modelscope_dolly.kernels.quantized_linear import stored_shapes
from modelscope_dolly.prompt import DollyTokenizer

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

log = logging.getLogger("modelscope.dolly")


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose configuration, tokenizer and list of tensors have been checked; the weights are still on disk.

    Attributes:
        path: the directory.
        config: sizes and constants of the network.
        tokenizer: with the prompt contract.
        tensors: name of each parameter -> (file, name inside that file).
        quantization: "int8" or "int4" where the linear layers are stored so (see kernels/quantized_linear.py), else
            None.
    """

    path: Path
    config: GPTNeoXConfig
    tokenizer: DollyTokenizer
    tensors: TensorLocations
    quantization: str | None = None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.config).values())


def open_checkpoint(path: str | Path, verify: bool = True, add_keys: bool = False) -> Checkpoint:
    """Check everything but the values of the weights, in seconds; with `verify` also the manifest, where there is one.

    With `add_keys` a base model will do: its tokenizer gets the three keys, as in training.

    Raises:
        CheckpointError: names the file, what was found, what was expected, and the command that repairs it.
    """
    path = Path(path_of("model", path))
    try:
        kind = file_kind(path)
        if kind != "directory":
            problem = "is a file; give the directory that holds config.json" if kind else "no such directory"
            raise CheckpointError(f"{path}: {problem}")
        config = read_config(path)
        files = weight_files(path)
        if verify:
            raise_problems(manifest.differences(path, [*_side_files(path), *(file.name for file in files)]))
        tokenizer = read_tokenizer(path, add_keys)
        check_vocabulary(path, config, tokenizer)
        tensors = tensor_locations(path, config)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {repair_hint(path)}") from error.__cause__
    if verify and file_kind(path / manifest.NAME) is None:
        log.warning(
            "%s: no recorded checksums (%s), so a changed weight cannot be noticed; to record those of files that you "
            "trust: dolly check --write-manifest %s", path, manifest.NAME, shlex.quote(str(path)),
        )  # fmt: skip
    return Checkpoint(path, config, tokenizer, tensors, read_quantization(path))


def tensor_locations(path: Path, config: GPTNeoXConfig) -> TensorLocations:
    """Where each tensor of the network is stored. Raises CheckpointError unless names, shapes and types are right."""
    expected = stored_shapes(parameter_shapes(config), read_quantization(path))
    locations, problems = locate_tensors(path, expected, weight_files(path))
    raise_problems(problems)
    return locations


def raise_problems(problems: list[str]) -> None:
    """Raises CheckpointError with the first three of the problems; returns where there are none."""
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError("; ".join(problems[:3]) + more)


def _side_files(path: Path) -> list[str]:
    names = ("config.json", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")
    return [name for name in names if file_kind(path / name)] + [p.name for p in sorted(path.glob("*.index.json"))]
