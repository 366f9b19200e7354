"""A copy of a checkpoint that computes the same function with a few very large channels in its activations.

Networks of seven billion weights and more have hidden channels whose activations are 20 to 60 times the others
(Dettmers et al. 2022, arXiv:2208.07339); how strong they are depends on the training (Ahmadian et al. 2023,
arXiv:2305.19268). Small networks and random weights have none, and so cannot show what activations of few bits do to
the large ones. Here such channels are made: weight and bias of every layer norm are multiplied by a factor in a few
channels, and the columns of the linear layers that read them are divided by it. That is harsher than reality, where the
weights of such channels are not small.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from modelscope_dolly.checkpoint.memory import weight_bytes
from modelscope_dolly.checkpoint.reader import Checkpoint
from modelscope_dolly.checkpoint.weights import read_tensors, write_tensors
from modelscope_dolly.checkpoint.writer import seal_directory, write_side_files
from modelscope_dolly.files import check_disk, new_directory, read_json, write_json

#: Channels that are made large, the same in all layers.
CHANNELS = 2
#: Linear layers that read the output of a layer norm.
_READERS = ("query_key_value.weight", "dense_h_to_4h.weight", "embed_out.weight")


def copy_with_outliers(checkpoint: Checkpoint, target: Path, factor: float) -> Path:
    """Write `target`, which answers as `checkpoint` does but for rounding to the number type of the files.

    Raises:
        CheckpointError: `target` exists, or the disk does not take it.
        HardwareError: the disk is too small; said before anything is written.
    """
    check_disk(target, weight_bytes(checkpoint.config, 4), "a copy with outliers", "set TMPDIR")
    with new_directory(target) as directory:
        write_tensors(directory, _scaled(read_tensors(checkpoint.tensors), checkpoint.config.hidden_size, factor))
        write_json(directory / "config.json", read_json(checkpoint.path / "config.json"))
        checkpoint.tokenizer.tokenizer.save_pretrained(directory)
        write_side_files(directory, checkpoint.tokenizer)
        seal_directory(directory)
    return target


def _scaled(
    tensors: Iterator[tuple[str, torch.Tensor]], width: int, factor: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with large channels, spread evenly over the `width` of the network."""
    channels = torch.arange(CHANNELS) * width // CHANNELS + width // (2 * CHANNELS)
    for name, tensor in tensors:
        changed = tensor.clone()
        if "norm" in name:
            changed[channels] = (tensor[channels].float() * factor).to(tensor.dtype)
        elif name.endswith(_READERS):
            changed[:, channels] = (tensor[:, channels].float() / factor).to(tensor.dtype)
        yield name, changed
