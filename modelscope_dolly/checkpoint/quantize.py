"""A quantised copy of a checkpoint directory: its linear layers are stored as int8 or int4.

Loading it reads half or a quarter of the bytes. The layout of the tensors is that of kernels/quantized_linear.py;
everything else in the directory is as writer.py writes it, manifest included.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from modelscope_dolly.checkpoint.config import quantization_entry
from modelscope_dolly.checkpoint.memory import weight_bytes
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.weights import read_tensors, write_tensors
from modelscope_dolly.checkpoint.writer import seal_directory, write_side_files
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.errors import CheckpointError, SettingError, one_line
from modelscope_dolly.files import check_disk, new_directory, path_of, read_json, write_json
from modelscope_dolly.kernels.quantized_linear import STORED_METHODS, is_linear, parse_quantize, stored_tensors


def quantize_checkpoint(source: str | Path, target: str | Path, method: str = "int8") -> Path:
    """Write `target`, a quantised copy of the directory `source`; takes memory for two tensors and one shard of 1 GiB.

    Raises:
        CheckpointError: `source` is damaged, or `target` exists or cannot be written.
        SettingError: unknown method, or `source` is quantised already.
        HardwareError: the disk is too small.
    """
    method, target = parse_quantize(method), Path(path_of("target", target))
    if method is None:
        raise SettingError("the copy would not be quantised; give int8 or int4")
    if method not in STORED_METHODS:
        raise SettingError(f"{method} computes with the weights of int8: write int8, and load it as {method}")
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization:
        raise SettingError(f"{source}: is quantised to {checkpoint.quantization} already; give the original")
    shapes = parameter_shapes(checkpoint.config)
    check_disk(target, weight_bytes(checkpoint.config, 4, method), "the quantised copy")
    try:
        with new_directory(target) as directory:
            write_tensors(directory, _quantized(read_tensors(checkpoint.tensors), method, len(shapes)))
            config = read_json(checkpoint.path / "config.json")
            write_json(directory / "config.json", config | quantization_entry(method))
            checkpoint.tokenizer.tokenizer.save_pretrained(directory)
            write_side_files(directory, checkpoint.tokenizer)
            seal_directory(directory)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({one_line(error)})") from None
    return target


def _quantized(tensors: Iterator, method: str, count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tqdm(tensors, total=count, unit="tensors", desc="Quantising", disable=None, leave=False):
        if is_linear(name, tensor.shape):
            yield from stored_tensors(name, tensor, method).items()
        else:
            yield name, tensor.clone()  # the tensor read is a view of a file
