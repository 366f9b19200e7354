"""A LoRA adapter directory in peft's format, and what a network's weights are with it (arXiv:2106.09685).

    adapter_config.json         peft's settings; of them only rank and alpha change the numbers
    adapter_model.safetensors   lora_A [r, inputs] and lora_B [outputs, r] of linear layers; new rows of the embedding
                                and of the output matrix
    base.json                   which base it was trained on: name, and SHA-256 of its weights (ours, not peft's)
    manifest.json               checksums, as in a model directory

W becomes W + alpha / r * B A, computed in float32 tensor by tensor while the base is read: no second copy of the
weights is ever held. The directory is read as a model directory is: sizes are bounded, nothing is unpickled, no code
is run.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.weights import WeightFile
from modelscope_dolly.errors import CheckpointError, is_whole, one_line, shown
from modelscope_dolly.files import file_kind, path_of, read_json, write_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger("modelscope.dolly")

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
#: The linear layers of a GPT-NeoX; "dense" is that of the attention only: names are compared up to a dot.
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
#: Far above what is in use, and below what a mistake costs. The widest layer of a dolly has 20,480 outputs.
MOST_RANK, MOST_ALPHA = 16_384, 1e6
_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(gpt_neox\.layers\.\d{1,4}\.(?:attention|mlp)\.(?:" + "|".join(LINEARS) + r"))\.lora_([AB])\.weight"
)
_ROWS = {
    "gpt_neox.embed_in.token_adapter.trainable_tokens_delta": ("embed_in", "gpt_neox.embed_in.weight"),
    "lm_head.token_adapter.trainable_tokens_delta": ("lm_head", "embed_out.weight"),
}
#: Settings of peft that change the formula above, with the values that do not.
_PLAIN = {
    "fan_in_fan_out": (False, None), "use_dora": (False, None), "lora_bias": (False, None), "bias": ("none", None),
    "modules_to_save": (None, []), "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "use_qalora": (False, None),
    "layer_replication": (None,), "target_parameters": (None, []), "alora_invocation_tokens": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter whose settings and list of tensors have been checked; the numbers are still on disk.

    Attributes:
        path: the directory.
        scaling: alpha / r.
        base_digest, base_name: of the base it was trained on; None where it does not say, as peft's own do not.
        pairs: parameter of the network -> names of its A and B in the file.
        rows: parameter -> (name in the file, token ids): rows that take the place of the base's.
    """

    path: Path
    scaling: float
    base_digest: str | None
    base_name: str | None
    pairs: Mapping[str, tuple[str, str]]
    rows: Mapping[str, tuple[str, tuple[int, ...]]]

    def merged(
        self, tensors: Iterable[tuple[str, torch.Tensor]], vocabulary: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`tensors` with the adapter added: float32 where it changes one, the others as they come.

        Args:
            tensors: (name, tensor on the CPU) of the base.
            vocabulary: rows that the embedding and the output matrix get, as in training.

        Raises:
            CheckpointError: numbers that are not finite.
        """
        weights = WeightFile(self.path / WEIGHTS)
        for name, tensor in tensors:
            if name in self.pairs:
                a, b = (self._read(weights, part) for part in self.pairs[name])
                tensor = tensor.float().addmm(b, a, alpha=self.scaling)
            elif name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
                tensor = self._with_rows(weights, name, tensor, vocabulary)
            yield name, tensor

    def _with_rows(self, weights: WeightFile, name: str, tensor: torch.Tensor, vocabulary: int) -> torch.Tensor:
        kept = min(len(tensor), vocabulary)
        if name not in self.rows and kept == vocabulary:
            return tensor[:kept]
        extended = tensor.new_zeros((vocabulary, tensor.shape[1]), dtype=tensor.dtype).float()
        extended[:kept] = tensor[:kept]
        if name in self.rows:
            stored, ids = self.rows[name]
            extended[list(ids)] = self._read(weights, stored)
        return extended

    def _read(self, weights: WeightFile, name: str) -> torch.Tensor:
        tensor = weights.tensor(name).float()
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self.path / WEIGHTS}: {name} holds numbers that are not finite")
        return tensor

    def new_rows(self, base_vocabulary: int) -> set[int]:
        """Token ids from `base_vocabulary` on that the adapter has rows for, in every table of the network."""
        found = [{row for row in ids if row >= base_vocabulary} for _, ids in self.rows.values()]
        return set.intersection(*found) if len(found) == len(_ROWS) else set()


def open_adapter(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], vocabulary: int, verify: bool = True
) -> Adapter:
    """Check an adapter directory against the network it is for.

    Args:
        path: the directory.
        shapes: of the network's parameters.
        vocabulary: tokens of the network once the adapter is in it.
        verify: compare the files with manifest.json where there is one.

    Raises:
        CheckpointError: no adapter, damaged, of another network, or of a kind that is not LoRA's plain sum.
    """
    path = Path(path_of("adapter", path))
    if file_kind(path) != "directory":
        raise CheckpointError(f"{path}: no such directory; an adapter is one with {CONFIG} and {WEIGHTS}")
    config = read_json(path / CONFIG)
    scaling = _scaling(path / CONFIG, config)
    if file_kind(path / WEIGHTS) != "file":
        raise CheckpointError(f"{path / WEIGHTS}: missing, or not a regular file; pickled adapters are not read")
    names = [name for name in (CONFIG, WEIGHTS, BASE) if file_kind(path / name)]
    if verify and (messages := manifest.differences(path, names)):
        raise CheckpointError(messages[0])
    digest, name = _read_base(path)
    pairs, rows = _tensors(path, config, shapes, vocabulary)
    return Adapter(path, scaling, digest, name, pairs, rows)


class AdapterFacts(NamedTuple):
    """What an adapter says about itself."""

    rank: int
    alpha: float
    base_name: str
    base_digest: str


def check_alone(path: Path) -> AdapterFacts:
    """Check an adapter that is to be published, as far as that is possible without its base; reads every number.

    Raises:
        CheckpointError: damaged, of another kind, or without a record of its base.
    """
    config = read_json(path / CONFIG)
    _scaling(path / CONFIG, config)
    if file_kind(path / WEIGHTS) != "file":
        raise CheckpointError(f"{path / WEIGHTS}: missing, or not a regular file")
    if messages := manifest.differences(path):
        raise CheckpointError(messages[0])
    digest, name = _read_base(path)
    if digest is None:
        raise CheckpointError(f"{path / BASE}: missing: an adapter is published with the digest of its base")
    weights = WeightFile(path / WEIGHTS)
    for stored in weights.names:
        tensor, known = stored.removeprefix(_PREFIX), stored.startswith(_PREFIX)
        if not known or not (_LORA.fullmatch(tensor) or tensor in _ROWS):
            raise CheckpointError(
                f"{path / WEIGHTS}: unexpected tensor {shown(stored, 100)}, not an adapter of a dolly"
            )
        if not weights.tensor(stored).isfinite().all():
            raise CheckpointError(f"{path / WEIGHTS}: {stored} holds numbers that are not finite")
    return AdapterFacts(config["r"], float(config["lora_alpha"]), name or "", digest)


def write_base(directory: Path, name: str, digest: str) -> None:
    """Record the base of an adapter."""
    write_json(directory / BASE, {"version": 1, "name": name, "weights_sha256": digest})


def check_base(adapter: Adapter, base: Path, weights: Iterable[Path], verify: bool) -> None:
    """Refuse a base that the adapter was not trained on.

    The rule: where both are known, the SHA-256 of the base's weights must be the recorded one. It comes from the
    base's manifest, or without one from its weight files, which are read (2.5 s a GiB). `verify=False` reads nothing,
    so a base without a manifest is then taken as it is, and a line says so.

    Raises:
        CheckpointError: another base.
    """
    if adapter.base_digest is None:
        log.warning("%s: has no %s, so whether %s is its base cannot be told; shapes agree", adapter.path, BASE, base)
        return
    found = manifest.weights_digest(base, weights, verify)
    if found is None:
        log.warning("%s: no %s, and verify is off: not compared with the base of %s", base, manifest.NAME, adapter.path)
    elif found != adapter.base_digest:
        raise CheckpointError(
            f"{adapter.path}: was trained on {adapter.base_name} with weights {adapter.base_digest[:12]}..., but "
            f"{base} has {found[:12]}...; give the base model it was trained on"
        )


def _scaling(file: Path, config: Mapping[str, Any]) -> float:
    """alpha / r. Raises CheckpointError for a kind of adapter that is more than that."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {shown(config.get('peft_type'))}, only LORA can be merged here")
    for name, allowed in _PLAIN.items():
        if config.get(name) not in allowed:
            raise CheckpointError(f"{file}: {name} is {shown(config[name])}, which this version cannot merge")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not is_whole(rank, 1, MOST_RANK):
        raise CheckpointError(f"{file}: r is {shown(rank)}, expected a whole number from 1 to {MOST_RANK:,}")
    if type(alpha) not in (int, float) or not 0 < alpha <= MOST_ALPHA:
        raise CheckpointError(f"{file}: lora_alpha is {shown(alpha)}, expected a number up to {MOST_ALPHA:,.0f}")
    stabilised = config.get("use_rslora")
    if stabilised not in (True, False, None):
        raise CheckpointError(f"{file}: use_rslora is {shown(stabilised)}, expected true or false")
    return alpha / math.sqrt(rank) if stabilised else alpha / rank


def _read_base(path: Path) -> tuple[str | None, str | None]:
    if file_kind(path / BASE) is None:
        return None, None
    base = read_json(path / BASE)
    digest, name = base.get("weights_sha256"), base.get("name")
    if base.get("version") != 1 or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(f"{path / BASE}: damaged: no version 1 with the weights_sha256 of a base")
    return digest, one_line(name, 200) if isinstance(name, str) else "an unnamed base"


def _tensors(
    path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], vocabulary: int
) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, tuple[int, ...]]]]:
    """The pairs and rows of an adapter file. Raises CheckpointError unless every tensor of it is one of them."""
    file, rank = path / WEIGHTS, config["r"]
    weights = WeightFile(file)
    halves: dict[str, dict[str, str]] = {}
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    for stored in weights.names:
        name = stored.removeprefix(_PREFIX)
        lora, shape = _LORA.fullmatch(name), weights.shape(stored)
        parameter = f"{lora[1]}.weight" if lora else _ROWS[name][1] if name in _ROWS else None
        if parameter not in shapes or not stored.startswith(_PREFIX):
            raise CheckpointError(f"{file}: unexpected tensor {shown(stored, 100)}, not an adapter of this network")
        if weights.number_type(stored) not in ("BF16", "F16", "F32", "F64"):
            raise CheckpointError(f"{file}: {stored} has type {weights.number_type(stored)}, expected a floating type")
        if lora:
            outputs, inputs = shapes[parameter]
            expected = (rank, inputs) if lora[2] == "A" else (outputs, rank)
            halves.setdefault(parameter, {})[lora[2]] = stored
        else:
            ids = _token_ids(path / CONFIG, config, _ROWS[name][0], vocabulary)
            expected = (len(ids), shapes[parameter][1])
            rows[parameter] = stored, ids
        if shape != expected:
            raise CheckpointError(f"{file}: {stored} has shape {list(shape)}, this network needs {list(expected)}")
    incomplete = [parameter for parameter, found in halves.items() if len(found) != 2]
    if incomplete or not (halves or rows):
        raise CheckpointError(f"{file}: {f'half of {incomplete[0]} is missing' if incomplete else 'has no tensors'}")
    return {parameter: (found["A"], found["B"]) for parameter, found in halves.items()}, rows


def _token_ids(file: Path, config: Mapping[str, Any], table: str, vocabulary: int) -> tuple[int, ...]:
    given = config.get("trainable_token_indices")
    ids = given.get(table) if isinstance(given, dict) else None
    known = isinstance(ids, list) and all(is_whole(row, 0, vocabulary - 1) for row in ids)
    if not known or len(set(ids)) != len(ids):
        raise CheckpointError(
            f"{file}: trainable_token_indices has no list of different token ids below {vocabulary} for {table}"
        )
    return tuple(ids)
