"""The network at both ends of a run: the base checkpoint is loaded, the finished model is exported."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.checkpoint.adapter import WEIGHTS
from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.writer import export_checkpoint, export_merged
from modelscope_dolly.errors import DollyError
from modelscope_dolly.hardware import DTYPES
from train.planning.zero_stage import ZeroChoice
from train.prepare import PreparedData
from train.training.lora import ADAPTER, add_adapters, keep_quantised_weights, quantization, save_adapter
from train.training.loss import CausalLMLoss
from train.training.trainer import DollyTrainer


def load_base(data: PreparedData, choice: ZeroChoice, use_deepspeed: bool, device: torch.device) -> torch.nn.Module:
    """The base model under a loss, its vocabulary cut or extended to the tokenizer's, as the public recipe does.

    In float32; but DeepSpeed casts a network to its half type before it makes its float32 master weights, so there it
    is loaded as that, which is the same and takes half the memory; and frozen weights under adapters need no more, or
    with `bits` still less.
    Directly onto the GPU, or every process of a machine would hold a copy in host memory; with ZeRO 3 transformers
    shards it while it loads instead.
    """
    dtype = DTYPES[choice.dtype] if use_deepspeed or data.lora else torch.float32
    model, report = GPTNeoXForCausalLM.from_pretrained(
        str(data.base),
        dtype=dtype,
        quantization_config=quantization(data.lora, dtype),
        device_map={"": device} if device.type == "cuda" and choice.stage < 3 else None,
        attn_implementation=data.batching.attention,
        output_loading_info=True,
    )
    unloaded = [*report["missing_keys"], *report["mismatched_keys"]]
    if unloaded:
        problem = f"{len(unloaded)} weights were not loaded, among them {unloaded[0]}"
        raise DollyError(f"{data.base}: {problem}; run: dolly check {data.base}")
    if model.config.vocab_size != data.network.vocab_size:
        model.resize_token_embeddings(data.network.vocab_size, mean_resizing=False)
    keep_quantised_weights(model)
    if choice.recompute:
        # Renamed in transformers 5; the old name goes in 6.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model = CausalLMLoss(model, data.batching.loss)
    return add_adapters(model, data.lora, data.tokenizer) if data.lora else model


def export_model(
    trainer: DollyTrainer,
    state: dict[str, torch.Tensor] | None,
    data: PreparedData,
    dtype: str,
    target: Path,
    checkpoint: Path | None = None,
) -> None:
    """Write the trained weights as a model directory, and check it. Adapters are saved alone beside it, and merged.

    Args:
        trainer: after training.
        state: its weights, gathered from all processes; not needed of adapters.
        data: of the run.
        dtype: number type to save, "bf16", "fp16" or "fp32".
        target: the new directory.
        checkpoint: of the run, whose weights are written instead of those of the last step.

    Raises:
        DollyError: the written directory has a problem.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if data.lora:
        adapter = target.parent / ADAPTER
        weights = load_file(checkpoint / WEIGHTS) if checkpoint else None
        save_adapter(trained, trainer.config.model, data.base, adapter, weights)
        # From the base's files, not from the network in memory, which may be rounded to a half type or to 4 bits.
        export_merged(open_checkpoint(data.base, verify=False, adapter=adapter), DTYPES[dtype], target)
    else:
        network = trained.network
        network.config.dtype = DTYPES[dtype]
        state = load_file(checkpoint / "model.safetensors") if checkpoint else state
        weights = {name.removeprefix("network."): tensor.to(DTYPES[dtype]) for name, tensor in state.items()}
        export_checkpoint(network, data.tokenizer, target, state=weights)
    problems = [finding.detail for finding in check_directory(target) if finding.status == "problem"]
    if problems:
        raise DollyError(f"{target} was written, but has problems: {'; '.join(problems)}")
