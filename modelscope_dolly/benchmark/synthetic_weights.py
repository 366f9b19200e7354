"""A checkpoint of random weights in a real shape, for measurements: speed does not depend on the values.

It is a complete directory like any other, so that whatever reads checkpoints can be measured on the same weights. The
tokenizer knows bytes and the control keys; measurements work with token ids, each of which has a text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelscope_dolly.checkpoint.config import transformers_config
from modelscope_dolly.checkpoint.memory import SHAPES, VOCABULARY, shape_config, weight_bytes
from modelscope_dolly.checkpoint.weights import write_tensors
from modelscope_dolly.checkpoint.writer import seal_directory, write_side_files
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.errors import SettingError, unknown_name
from modelscope_dolly.files import check_disk, new_directory
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig

#: Weights are cut from one block of so many random values, at offsets that differ from tensor to tensor. A prime,
#: so that the rows of a matrix never repeat.
_BLOCK = 16_777_213
_STRIDE = 1_048_573
#: As the initialisation of GPT-NeoX; it keeps activations of a deep network finite in every number type.
_SPREAD = 0.02


def parse_shape(text: str) -> NetworkConfig:
    """`3b`, `7b`, `12b`, or HIDDENxLAYERSxHEADS such as 1024x24x16. Raises SettingError."""
    if text in SHAPES:
        return shape_config(text)
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", text)
    if not match:
        raise SettingError(unknown_name("shape", text, (*SHAPES, "HIDDENxLAYERSxHEADS")))
    hidden, layers, heads = map(int, match.groups())
    # a head's rotary part is a quarter of its width, and goes in pairs
    if not (0 < hidden <= 1 << 16 and 0 < layers <= 1024 and heads > 0 and hidden % (8 * heads) == 0):
        raise SettingError(f"shape {text!r}: the hidden size must be a multiple of 8 times the heads, both at least 1")
    config = shape_config(next(iter(SHAPES)))
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = hidden, layers, heads
    config.intermediate_size = 4 * hidden
    return config


def make_checkpoint(config: NetworkConfig, target: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a complete directory of random weights, shard by shard (at most about 2 GB of memory).

    Raises:
        CheckpointError: `target` exists.
        HardwareError: the disk is too small; said before anything is written.
    """
    need = weight_bytes(config, dtype.itemsize)
    check_disk(target, need, "a checkpoint of this shape", "give another directory with --keep DIR, or set TMPDIR")
    with new_directory(target) as directory:
        transformers_config(config, architectures=["GPTNeoXForCausalLM"], dtype=dtype).save_pretrained(directory)
        write_tensors(directory, _tensors(config, seed, dtype))
        tokenizer = _tokenizer()
        tokenizer.tokenizer.save_pretrained(directory)
        write_side_files(directory, tokenizer)
        seal_directory(directory)
    return target


def _tensors(config: NetworkConfig, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    shapes = parameter_shapes(config)
    largest = max(math.prod(shape) for shape in shapes.values())
    size = min(_BLOCK, max(largest, 1009))
    block = torch.empty(size).normal_(0, _SPREAD, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for number, (name, shape) in enumerate(shapes.items()):
        if "norm" in name:
            yield name, torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=dtype)
            continue
        count, begin = math.prod(shape), number * _STRIDE % size
        parts, left = [block[begin : begin + count]], count - min(count, size - begin)
        while left > 0:
            parts.append(block[:left])
            left -= size
        yield name, torch.cat(parts).view(shape)


def _tokenizer() -> DollyTokenizer:
    """Bytes, a word for every further id, and control tokens, whose ids are those of the published tokenizer.

    Nothing was learned, so it is always the same: words come out, and none goes in.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    symbols = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [f"\u0120{number:x}" for number in range(len(symbols), VOCABULARY - len(CONTROL_KEYS))]
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    keys = [AddedToken(key, special=True, normalized=False) for key in (END_OF_TEXT, *CONTROL_KEYS)]
    backend.add_special_tokens(keys)
    return DollyTokenizer(backend)
