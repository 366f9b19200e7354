"""The GPT-NeoX network that the engine runs.

Same arithmetic and parameter names as transformers' `GPTNeoXForCausalLM` (models/gpt_neox/modeling_gpt_neox.py), made
for generation: tokens of unequal prompts lie end to end without padding, keys and values go into a cache of fixed size.

Shapes: N tokens in this pass, H heads, D values per head, E = H * D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from modelscope_dolly.engine.attention import attend
from modelscope_dolly.engine.bounded_shapes import bounded, fill_up, in_pieces
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.rotary import Rotary
from modelscope_dolly.engine.step_input import StepInput

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig


class Attention(nn.Module):
    def __init__(self, config: NetworkConfig, index: int, rotary: Rotary):
        super().__init__()
        self.heads, self.index, self.rotary = config.num_attention_heads, index, rotary
        size, bias = config.hidden_size, config.attention_bias
        self.query_key_value = nn.Linear(size, 3 * size, bias=bias)
        self.dense = nn.Linear(size, size, bias=bias)

    def forward(self, x: torch.Tensor, step: StepInput, cache: KVCache) -> torch.Tensor:
        """x [N, E] -> [N, E]; writes this pass's keys and values into the cache. Rows behind the tokens are padding."""
        qkv = self.query_key_value(x)[: len(step.positions)].view(len(step.positions), self.heads, 3, -1)
        keys, values = cache.layer_cache(self.index, qkv[:, :, 1])
        return self.dense(fill_up(attend(qkv, self.rotary, step.on(x.device), keys, values), len(x)))


class MLP(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation, self.gelu = _activation(config.hidden_act), config.hidden_act == "gelu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gelu and getattr(self.dense_h_to_4h, "fuses_gelu", False):  # a layer that was put in its place
            return self.dense_4h_to_h(self.dense_h_to_4h(x, activation="gelu"))
        wide = self.dense_h_to_4h(x)
        on_cpu = wide.device.type == "cpu"
        return self.dense_4h_to_h(in_pieces(self.activation, wide) if on_cpu else self.activation(wide))


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == "gelu":  # of every dolly-v2; the import takes a second
        return nn.functional.gelu
    from transformers.activations import ACT2FN

    return ACT2FN[name]


class Layer(nn.Module):
    def __init__(self, config: NetworkConfig, index: int, rotary: Rotary):
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
    def __init__(self, config: NetworkConfig):
        super().__init__()
        rotary = Rotary(config)
        # Without initial weights: to draw normal numbers on "meta" makes torch import its compiler, for two seconds.
        self.embed_in = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, i, rotary) for i in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class GPTNeoX(nn.Module):
    """The whole network. Build it under `torch.device("meta")` and give it weights with load.load_network.

    Attributes:
        config: sizes and constants.
        cache_dtype: number type of the key/value cache; None is that of the layers.
        bounds_shapes: whether the rows of a pass are filled up to one of few numbers, see bounded_shapes.py.
    """

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.cache_dtype: torch.dtype | None = None
        self.bounds_shapes = False
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
        x = self.gpt_neox.embed_in(self._filled_up(tokens))
        for layer in self.gpt_neox.layers:
            x = layer(x, step, cache)
        rows = step.logit_rows()
        x = x[torch.tensor(rows, device=x.device)] if rows is not None else x[: len(tokens)]
        return self.embed_out(self._filled_up(self.gpt_neox.final_layer_norm(x)))[: len(x)]

    def _filled_up(self, rows: torch.Tensor) -> torch.Tensor:
        return fill_up(rows, bounded(len(rows))) if self.bounds_shapes else rows


def parameter_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this configuration holds; nothing is allocated."""
    with torch.device("meta"):
        net = GPTNeoX(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}
    if config.tie_word_embeddings:
        del shapes["embed_out.weight"]
    return shapes
