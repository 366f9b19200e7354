"""The weight files of a checkpoint: their names, the tensors in them, reading and writing.

Two layouts are read: safetensors (one file, or shards with an index), and that of the 2023 uploads (pytorch_model.bin,
whole or sharded, with buffers that later versions dropped). Pickles are read by an unpickler that calls nothing.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.errors import CheckpointError, one_line
from modelscope_dolly.files import file_kind, read_json, write_json

if TYPE_CHECKING:
    import torch

#: write_tensors starts the next file at this size, which bounds its memory.
SHARD_BYTES = 1 << 30

#: Name of each parameter -> (file, name inside that file).
TensorLocations = dict[str, tuple[Path, str]]

#: Buffers in files of 2023; transformers computes them today, and so do we.
_LEGACY = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
#: Number types as safetensors and torch spell them. Eight bits and fewer mean nothing without their scales.
_FLOATING = re.compile(r"(BF16|F16|F32|F64)|torch\.(bfloat16|float16|float32|float64)")
#: Number types of the tensors of a quantised checkpoint, by the last part of their names.
_QUANTIZED = {
    "weight_packed": ("I32",), "weight_int8": ("I8",), "weight_int4": ("U8",), "weight_scale": ("F32", "F16"),
}  # fmt: skip
_ALIASES = {"lm_head.weight": "embed_out.weight"}  # transformers 5 calls it so in memory


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights, safetensors first. Raises CheckpointError when one is missing."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = path / f"{stem}.{ending}.index.json"
        if file_kind(index):
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
                raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
            names = sorted(set(table.values()))
            if any(Path(name).name != name or name == ".." for name in names):
                raise CheckpointError(f"{index}: weight_map names a file outside the directory")
            missing = [name for name in names if file_kind(path / name) != "file"]
            if missing:
                raise CheckpointError(f"{path / missing[0]}: missing, {index.name} lists {len(names)} files")
            return [path / name for name in names]
        if file_kind(path / f"{stem}.{ending}") == "file":
            return [path / f"{stem}.{ending}"]
    raise CheckpointError(
        f"{path}: no weights: expected model.safetensors, model.safetensors.index.json with its shards, or "
        "pytorch_model.bin"
    )


class WeightFile:
    """The tensors of one file, read one by one. Every method raises CheckpointError where the file is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self._read: Callable[[str], torch.Tensor]
        self._shape: Callable[[str], tuple[int, ...]]
        self._number_type: Callable[[str], str]
        try:
            self._open_safetensors() if path.suffix == ".safetensors" else self._open_pickle()
        except Exception as error:
            raise CheckpointError(f"{path}: not a readable weights file ({one_line(error)})") from None

    def _open_safetensors(self) -> None:
        from safetensors import safe_open

        file = safe_open(self.path, framework="pt")
        self.names = list(file.keys())
        self._read = file.get_tensor
        self._shape = lambda name: tuple(file.get_slice(name).get_shape())
        self._number_type = lambda name: file.get_slice(name).get_dtype()

    def _open_pickle(self) -> None:
        import torch

        with zipfile.ZipFile(self.path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed, as torch.save never does: it could be of any size in memory")
        # weights_only: an unpickler that knows tensors and plain containers and calls nothing else.
        # mmap: the tensors point into the file, so the host never holds a second copy.
        tensors = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(tensors, dict) or not all(_is_named_tensor(*item) for item in tensors.items()):
            raise ValueError("not a dictionary of named, dense tensors")
        self.names = list(tensors)
        self._read = tensors.__getitem__
        self._shape = lambda name: tuple(tensors[name].shape)
        self._number_type = lambda name: str(tensors[name].dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._guard(self._shape, name)

    def number_type(self, name: str) -> str:
        return self._guard(self._number_type, name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, a view of the file where possible: copy it before the file is closed."""
        return self._guard(self._read, name)

    def _guard(self, read: Callable, name: str):
        try:
            return read(name)
        except Exception as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read ({one_line(error)})") from None


def _is_named_tensor(name: object, value: object) -> bool:
    import torch

    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return dense and isinstance(name, str)


def locate_tensors(
    path: Path, expected: dict[str, tuple[int, ...]], files: list[Path]
) -> tuple[TensorLocations, list[str]]:
    """Where each tensor is stored, and all problems with names, shapes and types. Reads headers only.

    Args:
        path: the directory.
        expected: shape of each tensor by name.
        files: the weight files.
    """
    locations: TensorLocations = {}
    problems = []
    for file in files:
        weights = WeightFile(file)
        for stored in weights.names:
            name = _ALIASES.get(stored, stored)
            if _LEGACY.fullmatch(name) or (name == "embed_out.weight" and name not in expected):
                continue  # a tied head is the embedding
            shape = weights.shape(stored)
            if name not in expected:
                problems.append(f"{file}: unexpected tensor {stored} {list(shape)}, not in the network of config.json")
            elif name in locations:
                problems.append(f"{file}: {name} is also in {locations[name][0].name}")
            elif 0 in shape:
                problems.append(
                    f"{file}: {name} is empty, found shape {list(shape)}, expected {list(expected[name])}: a ZeRO-3 "
                    "run saved placeholders; save again with stage3_gather_16bit_weights_on_model_save"
                )
            elif shape != expected[name]:
                problems.append(f"{file}: {name} has shape {list(shape)}, config.json says {list(expected[name])}")
            elif problem := _type_problem(name, weights.number_type(stored)):
                problems.append(f"{file}: {name} {problem}")
            locations.setdefault(name, (file, stored))
    for name, shape in expected.items():
        if name not in locations:
            problems.append(f"{path}: tensor {name} {list(shape)}, expected by config.json, is in no weight file")
    return locations, problems


def _type_problem(name: str, number_type: str) -> str | None:
    allowed = _QUANTIZED.get(name.rpartition(".")[2])
    if allowed is not None:
        return None if number_type in allowed else f"has type {number_type}, expected {' or '.join(allowed)}"
    return None if _FLOATING.fullmatch(number_type) else f"has type {number_type}, expected bf16, fp16, fp32 or fp64"


def read_tensors(locations: TensorLocations) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of every parameter, file by file. Copy a tensor before asking for the next one."""
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, (file, stored) in locations.items():
        by_file.setdefault(file, []).append((name, stored))
    for file, names in by_file.items():
        weights = WeightFile(file)
        for name, stored in names:
            yield name, weights.tensor(stored)


def write_tensors(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write named tensors as safetensors while they arrive: one file, or several of about 1 GiB with an index.

    Memory: one file and one tensor.

    Raises:
        CheckpointError: the disk does not take them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    files: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def write() -> None:
        files.append(list(shard))
        path = directory / f"model-{len(files):05}.safetensors"
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:  # a full disk, above all
            raise CheckpointError(f"{path}: cannot be written ({one_line(error)})") from None
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
        if size >= SHARD_BYTES:
            write()
            size = 0
    if shard:
        write()
    if len(files) == 1:
        (directory / "model-00001.safetensors").rename(directory / "model.safetensors")
        return
    weight_map = {name: f"model-{number:05}.safetensors" for number, names in enumerate(files, 1) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
