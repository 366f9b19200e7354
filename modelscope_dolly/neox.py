"""The GPT-NeoX forward pass that the engine runs.

Same arithmetic and parameter names as transformers' `GPTNeoXForCausalLM` (models/gpt_neox/modeling_gpt_neox.py, checked
token by token in tests/test_engine.py), cut for generation: tokens of unequal prompts lie end to end without padding,
and keys and values go into a cache of fixed size.

Shapes: N tokens in this pass, B slots, H heads, D values per head, E = H * D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from .errors import CheckpointError

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig


@dataclass
class Step:
    """What one pass works on: the whole prompts of some slots (prefill), or one token of each slot (decode).

    Attributes:
        positions: [N] place of each token in its own sequence.
        spans: prefill only; (slot, begin, end) of each prompt among the N tokens.
        length: decode only; number of cache places to look at: 1 + the largest position.
    """

    positions: torch.Tensor
    spans: tuple[tuple[int, int, int], ...] | None = None
    length: int = 0
    _moved: dict = field(default_factory=dict, repr=False)

    def on(self, device: torch.device, rotary: Rotary, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Positions [N], cos and sin [N, 1, R] and, in decode, mask [N, 1, 1, length] on a layer's device.

        Made once per device and pass, since layers may be spread over several.
        """
        if device not in self._moved:
            positions = self.positions.to(device)
            cos, sin = rotary(positions, dtype)
            mask = None
            if self.spans is None:
                mask = (torch.arange(self.length, device=device) <= positions[:, None])[:, None, None]
            self._moved[device] = (positions, cos, sin, mask)
        return self._moved[device]


class KVCache:
    """Keys and values of all layers: per layer two tensors [B, H, length, D], made where and when a layer first writes.

    Slots in use are kept at the front (0 .. n-1), so that a pass over n of them needs no gathering.
    """

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer; `like` [N, H, D] gives heads, width, number type and device."""
        if index not in self._layers:
            # Zeros, not empty: a masked place is multiplied by a weight of 0, and 0 * NaN would be NaN.
            shape = (self.slots, like.shape[1], self.length, like.shape[2])
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    @torch.inference_mode()  # the tensors were made inside a pass
    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for keys, values in self._layers.values():
            keys[target].copy_(keys[source])
            values[target].copy_(values[source])


class Rotary:
    """Rotary position embedding of the first R of D values (Su et al. 2021, arXiv:2104.09864; R = D * rotary_pct).

    Angles are computed in float32 whatever the model's number type, as in transformers.
    """

    def __init__(self, config: GPTNeoXConfig):
        parameters = config.rope_parameters
        if parameters.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"config.json: rope type {parameters['rope_type']!r} is not supported; dolly-v2 uses 'default'"
            )
        self.width = int(config.hidden_size // config.num_attention_heads * parameters["partial_rotary_factor"])
        exponents = torch.arange(0, self.width, 2, dtype=torch.float, device="cpu") / self.width
        self.inverse_frequencies = 1.0 / (parameters["rope_theta"] ** exponents)

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [N, 1, R] for positions [N]."""
        angles = positions[:, None].float() * self.inverse_frequencies.to(positions.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate x [N, H, D]."""
        turned, passed = x[..., : self.width], x[..., self.width :]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, passed), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTNeoXConfig, index: int, rotary: Rotary):
        super().__init__()
        self.heads, self.index, self.rotary = config.num_attention_heads, index, rotary
        size, bias = config.hidden_size, config.attention_bias
        self.query_key_value = nn.Linear(size, 3 * size, bias=bias)
        self.dense = nn.Linear(size, size, bias=bias)

    def forward(self, x: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """x [N, E] -> [N, E]; writes this pass's keys and values into the cache."""
        tokens = x.shape[0]
        positions, cos, sin, mask = step.on(x.device, self.rotary, x.dtype)
        query, key, value = self.query_key_value(x).view(tokens, self.heads, -1).chunk(3, dim=-1)
        query, key = self.rotary.turn(query, cos, sin), self.rotary.turn(key, cos, sin)
        keys, values = cache.layer(self.index, key)
        if step.spans is None:
            rows = torch.arange(tokens, device=x.device)
            keys[rows, :, positions] = key
            values[rows, :, positions] = value
            seen = (slice(tokens), slice(None), slice(step.length))
            out = F.scaled_dot_product_attention(query[:, :, None], keys[seen], values[seen], attn_mask=mask)
            out = out.reshape(tokens, -1)
        else:
            out = torch.empty_like(x)
            for slot, begin, end in step.spans:
                q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))
                keys[slot, :, : end - begin], values[slot, :, : end - begin] = k[0], v[0]
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                out[begin:end] = attended[0].transpose(0, 1).reshape(end - begin, -1)
        return self.dense(out)


class MLP(nn.Module):
    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        from transformers.activations import ACT2FN

        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self, config: GPTNeoXConfig, index: int, rotary: Rotary):
        super().__init__()
        self.parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, index, rotary)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
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


class NeoX(nn.Module):
    """The whole network. Build it under `torch.device("meta")` and give it weights with loading.load_network."""

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.config = config
        self.gpt_neox = Trunk(config)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """Logits of each slot's last token: tokens [N] -> [B', V], B' = spans (prefill) or N (decode)."""
        x = self.gpt_neox.embed_in(tokens)
        for layer in self.gpt_neox.layers:
            x = layer(x, step, cache)
        if step.spans is not None:
            x = x[torch.tensor([end - 1 for _, _, end in step.spans], device=x.device)]
        return self.embed_out(self.gpt_neox.final_layer_norm(x))


def parameter_shapes(config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this configuration holds; nothing is allocated."""
    with torch.device("meta"):
        net = NeoX(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}
    if config.tie_word_embeddings:
        del shapes["embed_out.weight"]
    return shapes
