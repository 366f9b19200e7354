"""The GPT-NeoX network that the engine runs.

Same arithmetic and parameter names as transformers' `GPTNeoXForCausalLM` (models/gpt_neox/modeling_gpt_neox.py), made
for generation: tokens of unequal prompts lie end to end without padding, keys and values go into a cache of fixed size.

Shapes: N tokens in this pass, H heads, D values per head, E = H * D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from modelscope_dolly.engine.attention import attend
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.rotary import Rotary
from modelscope_dolly.engine.step_input import StepInput

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig


class Attention(nn.Module):
    def __init__(self, config: GPTNeoXConfig, index: int, rotary: Rotary):
        super().__init__()
        self.heads, self.index, self.rotary = config.num_attention_heads, index, rotary
        size, bias = config.hidden_size, config.attention_bias
        self.query_key_value = nn.Linear(size, 3 * size, bias=bias)
        self.dense = nn.Linear(size, size, bias=bias)

    def forward(self, x: torch.Tensor, step: StepInput, cache: KVCache) -> torch.Tensor:
        """x [N, E] -> [N, E]; writes this pass's keys and values into the cache."""
        qkv = self.query_key_value(x).view(len(x), self.heads, 3, -1)
        keys, values = cache.layer_cache(self.index, qkv[:, :, 1])
        return self.dense(attend(qkv, self.rotary, step.on(x.device), keys, values))


class MLP(nn.Module):
    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        from transformers.activations import ACT2FN

        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation, self.gelu = ACT2FN[config.hidden_act], config.hidden_act == "gelu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gelu and getattr(self.dense_h_to_4h, "fuses_gelu", False):  # a layer that was put in its place
            return self.dense_4h_to_h(self.dense_h_to_4h(x, activation="gelu"))
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self, config: GPTNeoXConfig, index: int, rotary: Rotary):
        super().__init__()
        self.parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, index, rotary)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, step: StepInput, cache: KVCache) -> torch.Tensor:
        attended = self.attention(self.input_layernorm(x), step, cache)
        if self.parallel_residual:
            return self.mlp(self.post_attention_layernorm(x)) + attended + x
        x = x + attended
        return self.mlp(self.post_attention_layernorm(x)) + x


class Trunk(nn.Module):
    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        rotary = Rotary(config)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, rotary) for i in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class GPTNeoX(nn.Module):
    """The whole network. Build it under `torch.device("meta")` and give it weights with load.load_network.

    Attributes:
        config: sizes and constants.
        cache_dtype: number type of the key/value cache; None is that of the layers.
    """

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.config = config
        self.cache_dtype: torch.dtype | None = None
        self.gpt_neox = Trunk(config)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def new_cache(self, slots: int = 0, length: int = 0) -> KVCache:
        """An empty key/value cache for this network."""
        return KVCache(slots, length, self.cache_dtype)

    @property
    def cache_bytes(self) -> int:
        """Of the key/value cache, for each place of a slot, in all layers."""
        itemsize = (self.cache_dtype or self.gpt_neox.embed_in.weight.dtype).itemsize
        return 2 * self.config.num_hidden_layers * self.config.hidden_size * itemsize

    def forward(self, tokens: torch.Tensor, step: StepInput, cache: KVCache) -> torch.Tensor:
        """tokens [N] -> logits [N', V] of the tokens that the step asks for: see StepInput.logit_rows."""
        x = self.gpt_neox.embed_in(tokens)
        for layer in self.gpt_neox.layers:
            x = layer(x, step, cache)
        rows = step.logit_rows()
        if rows is not None:
            x = x[torch.tensor(rows, device=x.device)]
        return self.embed_out(self.gpt_neox.final_layer_norm(x))


def parameter_shapes(config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this configuration holds; nothing is allocated."""
    with torch.device("meta"):
        net = GPTNeoX(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}
    if config.tie_word_embeddings:
        del shapes["embed_out.weight"]
    return shapes
