"""Attention of one layer: the one place that chooses how it is computed.

| tokens of the pass            | where                                   | computed by                            |
|-------------------------------|-----------------------------------------|----------------------------------------|
| decode, verification          | CPU with the compiled library           | kernels/cpu.py, no mask                |
| decode, verification          | elsewhere                               | torch, slots as a rectangle with a mask |
| whole prompts                 | CUDA, half precision, Ampere or newer   | kernels/varlen_attention.py, one call  |
| prompts, chunks of prompts    | elsewhere                               | torch, prompt by prompt                |

A captured step with fused kernels has its own, see gpt_neox_fused.py.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from modelscope_dolly.engine.bounded_shapes import bounded, fill_up
from modelscope_dolly.engine.rotary import Rotary, apply_rotary
from modelscope_dolly.engine.step_input import DeviceStepInput
from modelscope_dolly.kernels import cpu, varlen_attention


def attend(
    qkv: torch.Tensor, rotary: Rotary, inputs: DeviceStepInput, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values into the cache, and attend causally.

    Args:
        qkv: [N, H, 3, D] query, key and value of the tokens; overwritten.
        rotary: of the network.
        inputs: of the pass, on the device of `qkv`.
        keys, values: [B, H, length, D] the layer's cache; written.

    Returns:
        [N, H * D].
    """
    step = inputs.step
    decodes = step.spans is None and not step.padded
    if decodes and cpu.attends(qkv.device, qkv.dtype, rotary.head_width, rotary.width):
        cos, sin = inputs.rotary_tables(rotary, torch.float32)
        return cpu.attend(qkv, cos, sin, inputs.slots, inputs.positions, keys, values)
    apply_rotary(qkv[:, :, :2], *inputs.rotary_tables(rotary, qkv.dtype))
    query, key, value = qkv.unbind(2)
    if step.spans is not None and (any(span.start for span in step.spans) or not varlen_attention.works(query)):
        return _each_prompt(query, key, value, inputs, keys, values)
    keys[inputs.slots, :, inputs.positions] = key
    values[inputs.slots, :, inputs.positions] = value
    if step.spans is not None:
        longest = max(span.end - span.begin for span in step.spans)
        return varlen_attention.attend(query, key, value, inputs.ends, longest).flatten(1)
    grid = inputs.grid
    cached = (slice(grid.shape[0]), slice(None), slice(step.length))
    query = grid.fill(query).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, keys[cached], values[cached], attn_mask=inputs.mask(query.dtype))
    return grid.gather(out.transpose(1, 2)).flatten(1)


def _each_prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inputs: DeviceStepInput,
    keys: torch.Tensor, values: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """One call of torch's attention per prompt, without padding; what is before a chunk comes from the cache.

    In half precision on a CPU torch may call oneDNN: then the shapes are bounded. No token sees what fills them up, as
    it lies behind all tokens.
    """
    out = query.new_empty(len(query), query[0].numel())
    half_on_cpu = query.device.type == "cpu" and query.dtype != torch.float32
    size = bounded if half_on_cpu else int
    for slot, begin, end, start, _ in inputs.step.spans or ():
        q, k, v = (tensor[begin:end].transpose(0, 1)[None] for tensor in (query, key, value))
        stop = start + end - begin
        keys[slot, :, start:stop], values[slot, :, start:stop] = k[0], v[0]
        if start:
            k, v = (cached[None, slot, :, :stop].to(q.dtype) for cached in (keys, values))
        q, k, v = fill_up(q, size(end - begin), 2), fill_up(k, size(stop), 2), fill_up(v, size(stop), 2)
        if start:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_(start)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out[begin:end] = attended[0, :, : end - begin].transpose(0, 1).flatten(1)
    return out
