"""The GPT-NeoX forward pass that the engine runs.

Same arithmetic and parameter names as transformers' `GPTNeoXForCausalLM` (models/gpt_neox/modeling_gpt_neox.py, checked
token by token in tests/test_engine.py), cut for generation: tokens of unequal prompts lie end to end without padding,
and keys and values go into a cache of fixed size.

Shapes: N tokens in this pass, B slots, H heads, D values per head, E = H * D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.kernels import cpu as kernels
from modelscope_dolly.kernels import varlen_attention as varlen

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig


@dataclass
class Step:
    """What one pass works on: whole prompts (prefill), one token of each slot (decode), or several of some (extend).

    Attributes:
        positions: [N] place of each token in its own sequence.
        spans: prefill only; (slot, begin, end) of each prompt among the N tokens.
        length: decode and extend; number of cache places to look at: 1 + the largest position, or more if `padded`.
        blocks: extend only; (slot, first position, number of tokens), in the order of the slots and of the tokens.
        last_only: extend only; logits of each block's last token instead of those of all N.
    """

    positions: torch.Tensor
    spans: tuple[tuple[int, int, int], ...] | None = None
    length: int = 0
    blocks: tuple[tuple[int, int, int], ...] | None = None
    last_only: bool = False
    padded: bool = False
    _placed: dict = field(default_factory=dict, repr=False)

    @classmethod
    def extend(cls, blocks: Sequence[tuple[int, int, int]], last_only: bool = False) -> Step:
        """New tokens of some slots, whose earlier tokens are in the cache already; `blocks` as above."""
        positions = [position for _, start, count in blocks for position in range(start, start + count)]
        return cls(torch.tensor(positions), length=max(positions) + 1, blocks=tuple(blocks), last_only=last_only)

    def on(self, device: torch.device, rotary: Rotary, dtype: torch.dtype) -> Placed:
        """What a layer on `device` needs; made once per device and pass, since layers may be spread over several."""
        if device not in self._placed:
            self._placed[device] = self._place(device, rotary, dtype)
        return self._placed[device]

    def _place(self, device: torch.device, rotary: Rotary, dtype: torch.dtype) -> Placed:
        tokens = len(self.positions)
        positions = self.positions.to(device)
        decodes = self.spans is None and not self.padded
        compiled = decodes and kernels.attends(device, dtype, rotary.head_width, rotary.width)
        cos, sin = rotary(positions, torch.float32 if compiled else dtype)
        if self.spans is not None:
            slots = torch.tensor([slot for slot, begin, end in self.spans for _ in range(begin, end)], device=device)
            ends = torch.tensor([0, *(end for _, _, end in self.spans)], dtype=torch.int32, device=device)
            return Placed(positions, cos, sin, slots, ends=ends)
        if compiled:
            owners = range(tokens) if self.blocks is None else [slot for slot, _, n in self.blocks for _ in range(n)]
            return Placed(positions, cos, sin, torch.tensor(owners), compiled=True)
        slots, offsets, grid = torch.arange(tokens, device=device), None, positions[:, None]
        if self.blocks is not None:
            rows = [(slot, offset) for slot, _, count in self.blocks for offset in range(count)]
            slots, offsets = torch.tensor(rows, device=device).unbind(1)
            shape = (1 + max(slot for slot, _, _ in self.blocks), max(count for _, _, count in self.blocks))
            grid = positions.new_zeros(shape)
            grid[slots, offsets] = positions
            if [count for _, _, count in self.blocks] == [shape[1]] * shape[0]:
                offsets = None  # the tokens fill the grid in order
        mask = None
        if grid.numel() > 1 or self.padded:  # a single token sees all
            hidden = torch.arange(self.length, device=device) > grid[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        return Placed(positions, cos, sin, slots, offsets, tuple(grid.shape), mask)

    def wanted(self) -> list[int] | None:
        """Which of the N tokens' logits are asked for; None: all."""
        if self.spans is not None:
            return [end - 1 for _, _, end in self.spans]
        if self.blocks is None or not self.last_only:
            return None
        return [end - 1 for end in itertools.accumulate(count for _, _, count in self.blocks)]


@dataclass(frozen=True)
class Placed:
    """A step on one device.

    The tokens of an attention call outside prefill lie in a grid [B, M]: slots by new tokens of the slot with the most.

    Attributes:
        positions: [N].
        cos, sin: [N, 1, 1, R], see Rotary.
        slots: [N] slot of each token.
        offsets: [N] column of each token in the grid; None where the tokens fill the grid in order.
        grid: (B, M).
        mask: [B, 1, M, length] added to attention scores: 0, or -inf for what lies ahead.
        ends: prefill only; int32 [spans + 1]: 0, and where each prompt ends.
        compiled: kernels.attend computes this step, without grid and mask; cos and sin are float32.
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    grid: tuple[int, ...] = ()
    mask: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    compiled: bool = False

    def spread(self, query: torch.Tensor) -> torch.Tensor:
        """[N, H, D] -> [B, H, M, D]; zeros where a slot has fewer tokens."""
        if self.offsets is None:
            return query.view(*self.grid, *query.shape[1:]).transpose(1, 2)
        spread = query.new_zeros(*self.grid, *query.shape[1:])
        spread[self.slots, self.offsets] = query
        return spread.transpose(1, 2)

    def gather(self, out: torch.Tensor) -> torch.Tensor:
        """[B, H, M, D] -> [N, E]."""
        out = out.transpose(1, 2)
        if self.offsets is not None:
            out = out[self.slots, self.offsets]
        return out.reshape(len(self.positions), -1)


class KVCache:
    """Keys and values of all layers: per layer two tensors [B, H, length, D], made where and when a layer first writes.

    Slots in use are kept at the front (0 .. n-1), so that a pass over n of them needs no gathering.
    """

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(
        self, index: int, like: torch.Tensor, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer; `like` [N, H, D] gives heads, width, device and, without `dtype`, its type."""
        if index not in self._layers:
            # Zeros, not empty: a masked place is multiplied by a weight of 0, and 0 * NaN would be NaN.
            shape = (self.slots, like.shape[1], self.length, like.shape[2])
            self._layers[index] = (like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype))
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
        self.head_width = config.hidden_size // config.num_attention_heads
        self.width = int(self.head_width * parameters["partial_rotary_factor"])
        exponents = torch.arange(0, self.width, 2, dtype=torch.float, device="cpu") / self.width
        self.inverse_frequencies = 1.0 / (parameters["rope_theta"] ** exponents)
        self._on: dict[torch.device, torch.Tensor] = {}

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [N, 1, 1, R] for positions [N]; the first half of sin is negative, see turn."""
        if positions.device not in self._on:  # moved once: a recorded step may not copy from the host
            self._on[positions.device] = self.inverse_frequencies.to(positions.device)
        angles = positions[:, None].float() * self._on[positions.device]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1)[:, None, None], torch.cat((-sin, sin), dim=-1)[:, None, None]

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate x [N, H, any, D] in place: each pair (i, i + R / 2) by its angle."""
        turned = x[..., : self.width]
        swapped = turned.roll(self.width // 2, dims=-1)
        turned.copy_(turned * cos + swapped.mul_(sin))


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
        placed = step.on(x.device, self.rotary, x.dtype)
        mixed = self.query_key_value(x).view(tokens, self.heads, 3, -1)
        keys, values = self.remembered(cache, mixed[:, :, 1])
        if placed.compiled:
            places = (placed.cos, placed.sin, placed.slots, placed.positions)
            return self.dense(kernels.attend(mixed, *places, keys, values))
        self.rotary.turn(mixed[:, :, :2], placed.cos, placed.sin)
        query, key, value = mixed.unbind(2)
        if step.spans is None:
            keys[placed.slots, :, placed.positions] = key
            values[placed.slots, :, placed.positions] = value
            seen = (slice(placed.grid[0]), slice(None), slice(step.length))
            spread = placed.spread(query)
            out = placed.gather(F.scaled_dot_product_attention(spread, keys[seen], values[seen], attn_mask=placed.mask))
        elif varlen.works(query):
            keys[placed.slots, :, placed.positions] = key
            values[placed.slots, :, placed.positions] = value
            longest = max(end - begin for _, begin, end in step.spans)
            out = varlen.attend(query, key, value, placed.ends, longest).reshape(tokens, -1)
        else:
            out = torch.empty_like(x)
            for slot, begin, end in step.spans:
                q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))
                keys[slot, :, : end - begin], values[slot, :, : end - begin] = k[0], v[0]
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                out[begin:end] = attended[0].transpose(0, 1).reshape(end - begin, -1)
        return self.dense(out)

    def remembered(self, cache: KVCache, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's part of the cache: bfloat16 where the linear layers round more and kernels.attend reads it."""
        quantised = getattr(self.query_key_value, "scales", None) is not None
        half = quantised and kernels.attends(key.device, key.dtype, key.shape[-1], self.rotary.width)
        return cache.layer(self.index, key, torch.bfloat16 if half else None)


class MLP(nn.Module):
    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        from transformers.activations import ACT2FN

        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation, self.gelu = ACT2FN[config.hidden_act], config.hidden_act == "gelu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gelu and getattr(self.dense_h_to_4h, "packed", False):  # one layer of quantize.py
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

    @property
    def in_float32(self) -> bool:
        """Whether the layers compute with float32 weights, neither of half precision nor quantised."""
        linear = self.gpt_neox.layers[0].mlp.dense_h_to_4h
        return isinstance(linear, nn.Linear) and linear.weight.dtype == torch.float32

    def forward(self, tokens: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """Logits of the tokens that the step wants: tokens [N] -> [N', V], N' = spans (prefill), N, or blocks."""
        x = self.gpt_neox.embed_in(tokens)
        for layer in self.gpt_neox.layers:
            x = layer(x, step, cache)
        wanted = step.wanted()
        if wanted is not None:
            x = x[torch.tensor(wanted, device=x.device)]
        return self.embed_out(self.gpt_neox.final_layer_norm(x))


def parameter_shapes(config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this configuration holds; nothing is allocated."""
    with torch.device("meta"):
        net = NeoX(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}
    if config.tie_word_embeddings:
        del shapes["embed_out.weight"]
    return shapes
