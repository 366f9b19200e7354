"""The sizes and constants of a network. No torch and no transformers here: reading a configuration imports neither."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class NetworkConfig:
    """What transformers' GPTNeoXConfig knows of the network's shape, by the same names; either will do for the engine.

    Attributes:
        rope_parameters: rope_type ("default"), rope_theta, partial_rotary_factor.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    )
