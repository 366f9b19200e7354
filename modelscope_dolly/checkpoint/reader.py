"""Open a checkpoint directory: configuration, tokenizer and headers of the weights, checked. No code from it is run."""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.adapter import Adapter, check_base, open_adapter
from modelscope_dolly.checkpoint.config import read_config, read_quantization
from modelscope_dolly.checkpoint.download import repair_hint
from modelscope_dolly.checkpoint.tokenizer import check_vocabulary, read_tokenizer
from modelscope_dolly.checkpoint.verification import FilesDiffer, Verification, raise_problems
from modelscope_dolly.checkpoint.weights import TensorLocations, locate_tensors, read_tensors, weight_files
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.files import file_kind, path_of
from modelscope_dolly.kernels.quantized_linear import stored_shapes
from modelscope_dolly.prompt import DollyTokenizer

if TYPE_CHECKING:
    import torch

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
        adapter: to be merged while the weights are read; config and tokenizer are those of the result.
    """

    path: Path
    config: NetworkConfig
    tokenizer: DollyTokenizer
    tensors: TensorLocations
    verification: Verification
    quantization: str | None = None
    mapped: bool = True
    adapter: Adapter | None = None

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

    def read_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the CPU) of every parameter, the adapter merged. Copy one before asking for the next."""
        tensors = read_tensors(self.tensors)
        return self.adapter.merged(tensors, self.config.vocab_size) if self.adapter else tensors


def open_checkpoint(
    path: str | Path,
    verify: bool | str = "always",
    wait: bool = True,
    adapter: str | Path | None = None,
    add_keys: bool = False,
) -> Checkpoint:
    """Check everything but the values of the weights; with `verify` also the manifest, where there is one.

    Args:
        path: the directory.
        verify: "always" hashes every file that answers depend on, True those that are not remembered (see
            verification.py), False none.
        wait: until the weight files have been hashed; otherwise read them in Checkpoint.verified.
        adapter: directory of an adapter to be merged while the weights are read.
        add_keys: a base model will do: its tokenizer gets the three keys, as in training.

    With an adapter the directory is its base model, which need not know the keys of dolly: the vocabulary becomes that
    of training.

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
            tokenizer = read_tokenizer(path, add_keys=add_keys or adapter is not None)
            if adapter is None:
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
    checkpoint = Checkpoint(
        path, config, tokenizer, tensors, verification, read_quantization(path)[0], mapped=verify != "always"
    )
    return checkpoint if adapter is None else _with_adapter(checkpoint, adapter, weight_files(path), bool(verify))


def _with_adapter(base: Checkpoint, adapter: str | Path, weights: list[Path], verify: bool) -> Checkpoint:
    """The base with an adapter to be merged. Raises CheckpointError unless they belong together."""
    if base.quantization:
        raise CheckpointError(
            f"{base.path}: is quantised to {base.quantization}, and an adapter is added to full weights; give the "
            f"checkpoint it was made from, with quantize={base.quantization!r}"
        )
    if base.config.tie_word_embeddings:
        raise CheckpointError(f"{base.path}: ties its embeddings, which no adapter here is for")
    vocabulary, rows = len(base.tokenizer.vocabulary()), base.config.vocab_size
    opened = open_adapter(adapter, parameter_shapes(base.config), vocabulary, verify)
    check_base(opened, base.path, weights, verify)
    if missing := sorted(set(range(rows, vocabulary)) - opened.new_rows(rows)):
        raise CheckpointError(
            f"{opened.path}: neither it nor {base.path} has embeddings of {len(missing)} tokens, among them token "
            f"{missing[0]}"
        )
    base.config.vocab_size = vocabulary
    return dataclasses.replace(base, adapter=opened)


def tensor_locations(path: Path, config: NetworkConfig) -> TensorLocations:
    """Where each tensor of the network is stored. Raises CheckpointError unless names, shapes and types are right."""
    expected = stored_shapes(parameter_shapes(config), *read_quantization(path))
    locations, problems = locate_tensors(path, expected, weight_files(path))
    raise_problems(problems)
    return locations


def _side_files(path: Path) -> list[str]:
    names = ("config.json", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")
    return [name for name in names if file_kind(path / name)] + [p.name for p in sorted(path.glob("*.index.json"))]
