"""What training needs, by arithmetic: memory of model states and activations, and bytes on disk. Nothing is loaded.

Symbols: P weights of the model, N ranks that share them, E hidden size, I width of the MLP, L layers, V vocabulary,
T tokens in one forward pass of one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from modelscope_dolly.engine.gpt_neox import parameter_shapes

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig

GIB = 2**30

#: Bytes of one weight, and of its gradient, in forward and backward.
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
#: Bytes per weight of Adam's two moments, and of the float32 copy of a weight or gradient.
MOMENTS, FLOAT32 = 8, 4
#: Bytes per logit at the peak: log-probabilities, their gradient, the logits' gradient, all float32. Measured with
#: torch's allocator profile over linear, float(), cross_entropy and backward (torch 2.13, CPU, bf16 and fp32).
LOGIT = 12
#: Bytes of a frozen weight in 4 bits: itself, a scale of a byte for 64, and one of four bytes for 256 of those
#: (arXiv:2305.14314, section 3); in 8: itself (the scale of a row counts for nothing).
QUANTISED = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}
#: DeepSpeed's default sub_group_size: ZeRO 3 updates that many weights at a time.
SUB_GROUP = 10**9
#: What a process takes on a CPU whatever the size of the network: threads, the Trainer, its Python objects. Measured
#: with train.memory_table on the nano model.
PROCESS = 16 << 20
#: Rows of the dolly keys, which adapters cannot reach: they are trained in the embedding and in the output matrix.
KEY_ROWS = 3


@dataclass(frozen=True)
class Job:
    """What is trained, and on how much text at once.

    Attributes:
        config: shape of the network.
        tokens: T, the most tokens in one forward pass of one rank.
        label_tokens: most response tokens among them; None: all, which is the worst record.
        checkpoint_activations: recompute each layer in the backward pass.
        lora_rank: rank of the adapters; 0 trains every weight.
        lora_targets: the linear layers of a block that have one; None: all four.
        lora_bits: 4 or 8 where the frozen linear layers are quantised.
    """

    config: NetworkConfig
    tokens: int = 2048
    label_tokens: int | None = None
    checkpoint_activations: bool = True
    lora_rank: int = 0
    lora_targets: tuple[str, ...] | None = None
    lora_bits: int | None = None

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.config)

    @cached_property
    def parameters(self) -> int:
        """P, without adapters."""
        return sum(map(math.prod, self._shapes.values()))

    @cached_property
    def adapters(self) -> int:
        """Weights that LoRA trains: rank * (inputs + outputs) per linear layer, and the rows of the dolly keys."""
        if not self.lora_rank:
            return 0
        targets = self.lora_targets
        matrices = [shape for name, shape in self._matrices if targets is None or name.split(".")[-2] in targets]
        return self.lora_rank * sum(map(sum, matrices)) + 2 * KEY_ROWS * self.config.hidden_size

    @property
    def _matrices(self) -> list[tuple[str, tuple[int, ...]]]:
        """Weights of the linear layers, without the output matrix."""
        return [(name, shape) for name, shape in self._shapes.items() if ".layers." in name and len(shape) == 2]

    def frozen(self, dtype: str = "bf16") -> int:
        """Bytes of the weights that adapters leave as they are; 0 where all are trained."""
        if not self.lora_rank:
            return 0
        quantised = sum(math.prod(shape) for _, shape in self._matrices) if self.lora_bits else 0
        return math.ceil(WIDTHS[dtype] * (self.parameters - quantised) + QUANTISED.get(self.lora_bits, 0) * quantised)

    @property
    def trained(self) -> int:
        return self.adapters or self.parameters

    @cached_property
    def largest(self) -> int:
        """Weights that ZeRO 3 gathers at once: those of a layer, or of an embedding."""
        blocks: dict[str, int] = {}
        for name, shape in self._shapes.items():
            block = ".".join(name.split(".")[:3]) if ".layers." in name else name
            blocks[block] = blocks.get(block, 0) + math.prod(shape)
        return max(blocks.values())

    def widened(self, dtype: str = "bf16") -> int:
        """Bytes of one quantised weight in the number type of the run, which a product makes of it and drops again."""
        largest = max(math.prod(shape) for _, shape in self._matrices)
        return WIDTHS[dtype] * largest if self.lora_bits else 0


@dataclass(frozen=True)
class ModelStates:
    """Bytes of weights, gradients and optimizer states: on each GPU, and in the memory of the host for all ranks."""

    gpu: int
    host: int


def model_states(
    parameters: int,
    stage: int,
    world: int,
    offload: str = "none",
    dtype: str = "bf16",
    adapters: int = 0,
    largest: int = 0,
    frozen: int | None = None,
) -> ModelStates:
    """Model states of mixed-precision Adam under ZeRO (arXiv:1910.02054, section 3.1 and figure 1).

    16 bytes per trained weight in bf16 or fp16: weight 2, gradient 2, and float32 master copy 4, first moment 4, second
    moment 4. Stage 1 shares the last three among the `world` ranks, stage 2 the gradients too, stage 3 the weights too;
    stage 3 also holds one gathered layer and its gradients, 4 bytes per weight of it in bf16 (DeepSpeed documentation,
    "Memory Requirements"). In fp32 also 16 bytes without ZeRO, which needs no master copy; DeepSpeed's stages 1 to 3
    make one all the same.

    Offloading the optimizer puts 16 bytes per trained weight on the host (12 and a float32 gradient), offloading all
    puts the weights there as well (same source: 16 and 18). Until all is offloaded, gradients are counted on the GPU:
    an upper bound, since DeepSpeed streams them to the host, that leaves room for the buckets they pass through.

    Args:
        parameters: P.
        stage: ZeRO stage, 0 to 3.
        world: N.
        offload: "none", "optimizer" or "all".
        dtype: "bf16", "fp16" or "fp32".
        adapters: trained weights of LoRA; the P others are then frozen and take only their width. 0: all are trained.
        largest: weights that stage 3 gathers at once.
        frozen: bytes of the frozen weights, where they do not take their width: see Job.frozen.
    """
    width = WIDTHS[dtype]
    trained = adapters or parameters
    frozen = (width * parameters if frozen is None else frozen) if adapters else 0
    master = 0 if dtype == "fp32" and stage == 0 else FLOAT32
    weights = (width * trained + frozen) / (world if stage >= 3 else 1)
    gradients = width * trained / (world if stage >= 2 else 1)
    optimizer = (master + MOMENTS) * trained / (world if stage >= 1 else 1)
    gathered = 2 * width * largest if stage >= 3 else 0
    host = (2 * FLOAT32 + MOMENTS) * trained
    if offload == "none":
        return ModelStates(math.ceil(weights + gradients + optimizer + gathered), 0)
    if offload == "optimizer":
        return ModelStates(math.ceil(weights + gradients + gathered), host)
    return ModelStates(gathered, host + width * trained + frozen)


def update_bytes(trained: int, stage: int, world: int, offload: str = "none", dtype: str = "bf16") -> int:
    """Bytes on a GPU that live only while the optimizer runs: its gradients in float32.

    DeepSpeed converts the whole share of a rank at once (documentation, "Memory Requirements", note about gradients),
    in stage 3 one sub-group. Activations are gone by then.
    """
    if dtype == "fp32" or offload != "none":
        return 0
    share = math.ceil(trained / (world if stage >= 1 else 1))
    return FLOAT32 * (min(share, SUB_GROUP) if stage >= 3 else share)


@dataclass(frozen=True)
class Activations:
    """Bytes on one GPU between forward and backward."""

    inputs: int
    layer: int
    logits: int

    @property
    def total(self) -> int:
        """The sum, although layer and logits peak one after the other: freed blocks are not always reused."""
        return self.inputs + self.layer + self.logits


def activations(
    config: NetworkConfig,
    tokens: int,
    checkpointing: bool = True,
    label_tokens: int | None = None,
    dtype: str = "bf16",
) -> Activations:
    """Activations of one forward and backward pass over T tokens, with fused attention (no T x T scores).

    inputs: T * E * L * width: what checkpointing keeps, the input of each layer. Without it all layers keep what the
        live layer saves: T * (10 E + 2 I) * L * width, the input among it.
    layer: T * (11 E + 3 I) * width, the layer that is recomputed and differentiated. Saved for backward: outputs of two
        norms, packed query-key-value 3 E, rotated query and key with a copy each, attention, MLP before and after its
        activation 2 I: 9 E + 2 I. Backward through the MLP adds two gradients of the residual stream and one of
        width I. Measured on transformers' GPTNeoXLayer with sdpa: 17.1 E saved, peak 22.5 E and the incoming gradient
        (torch 2.13, CPU, fp32, I = 4 E), against 23 E here. Without checkpointing only the 2 E + I of backward remain.
    logits: label tokens * V * 12 bytes; logits exist only where there is a label.
    """
    width, size, inner = WIDTHS[dtype], config.hidden_size, config.intermediate_size
    saved, backward = 9 * size + 2 * inner, 2 * size + inner
    per_layer, live = (size, saved + backward) if checkpointing else (size + saved, backward)
    labels = tokens if label_tokens is None else min(label_tokens, tokens)
    return Activations(
        inputs=tokens * per_layer * config.num_hidden_layers * width,
        layer=tokens * live * width,
        logits=labels * config.vocab_size * LOGIT,
    )


def checkpoint_bytes(trained: int, stage: int = 2, dtype: str = "bf16", use_deepspeed: bool = True) -> int:
    """Bytes of one checkpoint to resume from.

    The Trainer alone saves float32 weights and both moments: 12 for each trained weight. With DeepSpeed it saves the
    weights in their number type, and DeepSpeed saves them once more (not in stage 3), with a float32 copy and the
    moments: 16 in bf16, in stage 3 14.
    """
    if not use_deepspeed:
        return trained * (FLOAT32 + MOMENTS)
    copies = 1 if stage >= 3 else 2
    master = 0 if dtype == "fp32" and stage == 0 else FLOAT32
    return trained * (copies * WIDTHS[dtype] + master + MOMENTS)


def final_bytes(parameters: int, dtype: str = "bf16") -> int:
    """Bytes of the exported model."""
    return WIDTHS[dtype] * parameters


def disk_need(job: Job, steps: int, save_every: int, keep: int, checkpoint: int, dtype: str = "bf16") -> int:
    """Most bytes that a run of `steps` optimizer steps has on disk at once.

    A new checkpoint, of `checkpoint` bytes, is complete before the oldest is removed, so there are `keep` + 1 of them
    for a moment.
    """
    saved = min(math.ceil(steps / save_every), keep + 1)
    return saved * checkpoint + final_bytes(job.parameters, dtype)
