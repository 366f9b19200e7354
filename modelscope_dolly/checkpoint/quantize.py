"""`dolly quantize SRC DST`: a checkpoint directory whose linear layers are stored as int8 or int4.

It loads with half or a quarter of the reading. The layout is documented in quantize.py; everything else in the
directory is as export.py writes it, manifest included, and the directory is complete or absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.manifest import read_json
from modelscope_dolly.checkpoint.memory import weight_bytes
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.weights import read_tensors, write_tensors
from modelscope_dolly.checkpoint.writer import new_directory, seal_directory, write_side_files
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.errors import SettingError
from modelscope_dolly.hardware import check_disk
from modelscope_dolly.kernels.quantized_linear import MODEL_TYPE, is_linear, parse_quantize, stored_tensors


def quantize_checkpoint(source: str | Path, target: str | Path, method: str = "int8") -> Path:
    """Write `target`, a quantised copy of the directory `source`; takes memory for two tensors and one shard of 1 GiB.

    Raises:
        CheckpointError: `source` is damaged, or `target` exists.
        SettingError: unknown method, or `source` is quantised already.
        HardwareError: the disk is too small.
    """
    method, target = parse_quantize(method), Path(target)
    if method is None:
        raise SettingError("give int8 or int4: a checkpoint that is not quantised is what you have")
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization:
        raise SettingError(f"{source}: is quantised to {checkpoint.quantization} already; give the original")
    shapes = parameter_shapes(checkpoint.config)
    check_disk(target, weight_bytes(checkpoint.config, 4, method), "the quantised copy")
    with new_directory(target) as directory:
        write_tensors(directory, _quantised(read_tensors(checkpoint.tensors), method, len(shapes)))
        config = read_json(checkpoint.path / "config.json")
        config["model_type"] = MODEL_TYPE
        config["quantization_config"] = {"quant_method": f"dolly-{method}", "version": 1}
        manifest.write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")
        checkpoint.tokenizer.tokenizer.save_pretrained(directory)
        write_side_files(directory, checkpoint.tokenizer)
        seal_directory(directory)
    return target


def _quantised(tensors: Iterator, method: str, count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tqdm(tensors, total=count, unit="tensors", desc="Quantising", disable=None, leave=False):
        if is_linear(name, tensor.shape):
            yield from stored_tensors(name, tensor, method).items()
        else:
            yield name, tensor.clone()  # what was read is a view of a file
