"""Open a checkpoint directory: configuration, tokenizer and headers of the weights, checked. No code from it is run."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.config import read_config, read_quantization
from modelscope_dolly.checkpoint.download import repair_hint
from modelscope_dolly.checkpoint.tokenizer import check_vocabulary, read_tokenizer
from modelscope_dolly.checkpoint.verification import FilesDiffer, Verification, raise_problems
from modelscope_dolly.checkpoint.weights import TensorLocations, locate_tensors, weight_files
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.files import file_kind, path_of
from modelscope_dolly.kernels.quantized_linear import stored_shapes
from modelscope_dolly.prompt import DollyTokenizer

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig

log = logging.getLogger("modelscope.dolly")


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose configuration, tokenizer and list of tensors have been checked; the weights are still on disk.

    Attributes:
        path: the directory.
        config: sizes and constants of the network.
        tokenizer: with the prompt contract.
        tensors: name of each parameter -> (file, name inside that file).
        verification: of the weight files, which may go on beside their reading.
        quantization: "int8" or "int4" where the linear layers are stored so (see kernels/quantized_linear.py), else
            None.
        mapped: whether weights may stay in the mapped file, where they are stored as they are multiplied.
    """

    path: Path
    config: NetworkConfig
    tokenizer: DollyTokenizer
    tensors: TensorLocations
    verification: Verification
    quantization: str | None = None
    mapped: bool = True

    @contextmanager
    def verified(self) -> Iterator[None]:
        """Around the reading of the weights: at its end their files have been compared with the manifest.

        Raises:
            CheckpointError: they differ.
        """
        try:
            with self.verification.explaining_errors():
                yield
            self.verification.finish()
        except FilesDiffer as error:
            raise CheckpointError(f"{error}. {repair_hint(self.path)}") from None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.config).values())


def open_checkpoint(path: str | Path, verify: bool | str = "always", wait: bool = True) -> Checkpoint:
    """Check everything but the values of the weights; with `verify` also the manifest, where there is one.

    Args:
        path: the directory.
        verify: "always" hashes every file that answers depend on, True those that are not remembered (see
            verification.py), False none.
        wait: until the weight files have been hashed; otherwise read them in Checkpoint.verified.

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
        files = [file.name for file in weight_files(path)]
        if verify:
            raise_problems(manifest.differences(path, _side_files(path)))
        verification = Verification(path, files if verify else (), remember=verify is True)
        with verification.explaining_errors():
            tokenizer = read_tokenizer(path)
            check_vocabulary(path, config, tokenizer)
            tensors = tensor_locations(path, config)
            if wait:
                verification.finish()
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {repair_hint(path)}") from error.__cause__
    if verify and file_kind(path / manifest.NAME) is None:
        log.warning(
            "%s: no recorded checksums (%s), so a changed weight cannot be noticed; to record those of files that you "
            "trust: dolly check --write-manifest %s", path, manifest.NAME, shlex.quote(str(path)),
        )  # fmt: skip
    return Checkpoint(
        path, config, tokenizer, tensors, verification, read_quantization(path)[0], mapped=verify != "always"
    )


def tensor_locations(path: Path, config: NetworkConfig) -> TensorLocations:
    """Where each tensor of the network is stored. Raises CheckpointError unless names, shapes and types are right."""
    expected = stored_shapes(parameter_shapes(config), *read_quantization(path))
    locations, problems = locate_tensors(path, expected, weight_files(path))
    raise_problems(problems)
    return locations


def _side_files(path: Path) -> list[str]:
    names = ("config.json", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")
    return [name for name in names if file_kind(path / name)] + [p.name for p in sorted(path.glob("*.index.json"))]
