"""A decode step of the network in six Triton kernels per layer, for captured steps: see cuda_graphs.py."""

from __future__ import annotations

import torch
from torch import nn

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.kernels import triton_decode


def can_fuse(net: GPTNeoX) -> bool:
    """Whether `fused_forward` computes this network: dolly-v2 and pythia, not every GPT-NeoX."""
    return net.config.use_parallel_residual and net.config.hidden_act == "gelu"


def fused_forward(net: GPTNeoX, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """GPTNeoX.forward for one token [B] in each of the slots 0 to B - 1, in fewer kernels.

    Both layer norms in one; GELU and the two additions of the residual stream behind the linear layers before them;
    rotary embedding, writing to the cache and attention in one, which reads no further than each position.
    """
    x = net.gpt_neox.embed_in(tokens)
    cos, sin = (table.flatten(1) for table in net.gpt_neox.layers[0].attention.rotary(positions, x.dtype))
    for layer in net.gpt_neox.layers:
        attention, mlp = layer.attention, layer.mlp
        first, second = triton_decode.two_norms(x, layer.input_layernorm, layer.post_attention_layernorm)
        qkv = _linear(attention.query_key_value, first).view(len(x), attention.heads, 3, -1)
        keys, values = cache.layer_cache(attention.index, qkv[:, :, 1])
        attended = triton_decode.attend(qkv, cos, sin, keys, values, positions)
        hidden = _linear(mlp.dense_h_to_4h, second, gelu=True)
        x = _linear(attention.dense, attended, residual=x)
        x = _linear(mlp.dense_4h_to_h, hidden, residual=x)
    return _linear(net.embed_out, net.gpt_neox.final_layer_norm(x))


def _linear(module: nn.Module, x: torch.Tensor, gelu: bool = False, residual: torch.Tensor | None = None):
    scales = getattr(module, "scales", None)  # of a quantised layer
    return triton_decode.linear(x, module.weight, scales, module.bias, gelu=gelu, residual=residual)
