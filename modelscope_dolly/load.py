"""From a checkpoint directory to a model that answers, on one device or spread over several.

The one place that joins the network with weights, quantised layers, speculative decoding, CUDA graphs and forms. Knows
nothing of ModelScope: model.py and pipeline.py adapt it, the command line uses it directly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from modelscope_dolly.checkpoint.download import locate, locate_adapter
from modelscope_dolly.checkpoint.memory import weight_bytes
from modelscope_dolly.checkpoint.reader import Checkpoint, open_checkpoint
from modelscope_dolly.checkpoint.weights import WeightFile
from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.gpt_neox import GPTNeoX, parameter_shapes
from modelscope_dolly.engine.speculative.decoding import SpeculativeDecoding
from modelscope_dolly.engine.speculative.draft_model import DraftModel
from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from modelscope_dolly.errors import CheckpointError, HardwareError, SettingError, is_whole, shown
from modelscope_dolly.files import path_of
from modelscope_dolly.generation import TextGenerator
from modelscope_dolly.hardware import (
    Choice,
    choose_device,
    choose_dtype,
    choose_threads,
    cpu_computes_bf16,
    release_threads,
)
from modelscope_dolly.kernels import cpu
from modelscope_dolly.kernels.quantized_linear import (
    METHODS,
    PackedLinear,
    is_linear,
    packed_problem,
    parse_quantize,
    replace_linears,
)
from modelscope_dolly.placement import check_device_map, check_memory, device_of, plan_placement, spread
from modelscope_dolly.structured import Forms

log = logging.getLogger("modelscope.dolly")

#: Sequences that one engine runs at the same time.
MOST_SLOTS = 4096


@dataclass(frozen=True)
class Dolly:
    """A loaded dolly-v2.

    Attributes:
        checkpoint: where it came from; with configuration and tokenizer.
        net: the network, its weights in `dtype`.
        device: where token ids go in.
        text_generator: answers prompts with it.
    """

    checkpoint: Checkpoint
    net: GPTNeoX
    device: torch.device
    dtype: torch.dtype
    text_generator: TextGenerator


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict | None = None,
    verify: bool | str = True,
    quantize: str | None = None,
    threads: int | None = None,
    draft: str | Path | None = None,
    slots: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    adapter: str | Path | None = None,
    add_keys: bool = False,
) -> Dolly:
    """Load a checkpoint directory.

    Args:
        path: the directory; see checkpoint.locate for hub ids.
        device: see hardware.choose_device.
        dtype: "bf16", "fp16", "fp32", a torch.dtype, or None for what suits the device.
        device_map: "auto" or a dict, to spread the layers over several devices with accelerate; excludes `device`.
        verify: compare the files with manifest.json where there is one, by sha256, before the model answers anything.
            True reads those again that have changed since they were compared (see checkpoint/verification.py), "always"
            reads all of them, and copies weights that would be mapped; False compares nothing.
        quantize: "int8", "int8-dynamic" or "int4": the linear layers are quantised while they are read (CPU, or one
            CUDA device; int8-dynamic: CPU alone). See kernels/quantized_linear.py.
        threads: of the CPU, for the whole process; see hardware.choose_threads.
        draft: directory or hub id of a smaller model of the family with the same vocabulary; it proposes draft tokens
            for this one to verify. It lies on the same device, in the same number type, quantised the same way.
        slots: answers that are worked on at the same time, of all callers, as far as memory goes; None is 32, or more
            where a call asks for more.
        progress: called while the weights are read, with how many there are so far and in all.
        adapter: directory or hub id (owner/name, or owner/name@tag) of a LoRA adapter of this base model; it is merged
            while the weights are read, before they are quantised. Another base is refused.
        add_keys: a base model will do; see checkpoint.reader.open_checkpoint.

    Raises:
        CheckpointError, HardwareError, SettingError.
    """
    if slots is not None and not is_whole(slots, 1, MOST_SLOTS):
        raise SettingError(f"slots is {shown(slots)}, it must be a whole number from 1 to {MOST_SLOTS}")
    if device_map is not None:
        check_device_map(device_map)
        if device is not None and not (isinstance(device, str) and device == "gpu"):
            given = f"device={shown(device)} and device_map={shown(device_map)}"
            raise SettingError(f"{given} exclude each other; give one of them")
    chosen, requested = choose_device(device), parse_quantize(quantize)
    verify = _parse_verify(verify)
    draft = path_of("draft", draft) if draft is not None else None
    if threads is not None or chosen.value.type == "cpu":
        torch.set_num_threads(choose_threads(threads).value)
    located = locate_adapter(adapter) if adapter is not None else None
    checkpoint = open_checkpoint(path, verify, wait=False, adapter=located, add_keys=add_keys)
    with checkpoint.verified():
        return _load(checkpoint, chosen, dtype, device_map, verify, requested, draft, slots, progress)


def _parse_verify(verify: object) -> bool | str:
    if isinstance(verify, bool) or (isinstance(verify, str) and verify == "always"):
        return verify
    raise SettingError(f"verify is {shown(verify)}, it must be True, False or 'always'")


def _load(
    checkpoint: Checkpoint,
    chosen: Choice,
    dtype: str | torch.dtype | None,
    device_map: str | dict | None,
    verify: bool | str,
    requested: str | None,
    draft: str | None,
    slots: int | None,
    progress: Callable[[int, int], None] | None,
) -> Dolly:
    """As load, of a checkpoint that is open."""
    method = _quantization(checkpoint, requested)
    drafting = _open_draft(checkpoint, draft, verify) if draft is not None else None
    number_type = choose_number_type(checkpoint, chosen.value, dtype, method, drafting)
    place, number = chosen.value, number_type.value
    # The draft first: the room it takes is then gone when the network's own need is compared with what is free.
    draft_model = _load_draft(drafting, number, place, requested) if drafting is not None else None
    if device_map is None:
        log.info("device %s; weights in %s", chosen, number_type)
        if place.type == "cpu":
            log.info("packed linear layers and attention of decode steps: %s", cpu.describe())
        net = load_network(checkpoint, number, {"": place}, method, progress)
    else:
        placement = plan_placement(checkpoint.config, number, device_map)
        log.info("weights in %s over %s", number_type, sorted(map(str, set(placement.values()))))
        net = load_network(checkpoint, number, placement, method, progress)
        place = spread(net, placement)
    window = checkpoint.config.max_position_embeddings
    engine = Engine(net, place, window, partial(SpeculativeDecoding, draft=draft_model), slots=slots)
    if place.type == "cuda" and device_map is None:
        from modelscope_dolly.engine.cuda_graphs import GraphCapture, decode_mode  # imports Triton

        if decode_mode() != "plain":
            engine.capture = GraphCapture(net, place)
    forms = Forms(checkpoint.tokenizer, checkpoint.config.vocab_size)
    text_generator = TextGenerator(engine, checkpoint.tokenizer, PromptLookup, in_float32(net), forms)
    release_threads()  # another thread may be the one that asks
    return Dolly(checkpoint, net, place, number, text_generator)


def in_float32(net: GPTNeoX) -> bool:
    """Whether the layers have float32 weights: verifying several tokens in a step then changes no token."""
    linear = net.gpt_neox.layers[0].mlp.dense_h_to_4h
    return isinstance(linear, nn.Linear) and linear.weight.dtype == torch.float32


def choose_number_type(
    checkpoint: Checkpoint,
    device: torch.device,
    requested: str | torch.dtype | None = None,
    quantize: str | None = None,
    draft: Checkpoint | None = None,
) -> Choice:
    """hardware.choose_dtype, knowing what float32 takes here: bfloat16 weights stay so where our kernels compute.

    A draft has the number type of the network: float32 must have room for both.
    """
    if quantize or checkpoint.quantization:
        return choose_dtype(device, requested)  # it decides about the embedding alone
    need, method = held_bytes(checkpoint, torch.float32, device)
    need += held_bytes(draft, torch.float32, device)[0] if draft is not None else 0
    how = "; linear weights stay in bfloat16, as stored, and are multiplied in float32" if method else ""
    return choose_dtype(device, requested, need, how)


def held_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantize: str | None = None
) -> tuple[int, str | None]:
    """Bytes that the weights take on one device, and how linear layers are kept there, see bytes_per_weight."""
    method = _packing(checkpoint, dtype, {"": device}, _quantization(checkpoint, quantize))
    return weight_bytes(checkpoint.config, dtype.itemsize, method), method


def _open_draft(checkpoint: Checkpoint, draft: str, verify: bool | str) -> Checkpoint:
    """The draft for the network in `checkpoint`. Raises SettingError where their vocabularies differ."""
    other = open_checkpoint(locate(draft), verify)
    sizes = checkpoint.config.vocab_size, other.config.vocab_size
    tokens, other_tokens = (one.tokenizer.vocabulary() for one in (checkpoint, other))
    if sizes[0] != sizes[1] or tokens != other_tokens:
        found = f"{sizes[1]} tokens instead of {sizes[0]}" if sizes[0] != sizes[1] else "other tokens"
        raise SettingError(
            f"draft {draft!r} has another vocabulary than {checkpoint.path} ({found}); "
            "a draft must be a smaller model of the same family, such as dolly-v2-3b for dolly-v2-12b"
        )
    return other


def _load_draft(draft: Checkpoint, dtype: torch.dtype, place: torch.device, quantize: str | None) -> DraftModel:
    log.info("draft from %s", draft.path)
    return DraftModel(load_network(draft, dtype, {"": place}, _quantization(draft, quantize)))


def load_network(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    placement: dict[str, Any],
    quantize: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GPTNeoX:
    """Build the network and copy each tensor from its file straight to its device, in the final number type.

    Args:
        checkpoint: opened and checked.
        dtype: of the weights in memory.
        placement: module name -> device, as accelerate's device maps; "" is everything else.
        quantize: a name of `quantize=` or None; see kernels/quantized_linear.py.
        progress: called with the number of weights read so far and in all.

    Raises:
        HardwareError: it does not fit, or is to be quantised on several devices; raised before anything is read.
    """
    with torch.device("meta"):
        net = GPTNeoX(checkpoint.config)
    method = _packing(checkpoint, dtype, placement, _quantization(checkpoint, quantize))
    check_memory(net, dtype, placement, method)
    read, total = 0, sum(parameter.numel() for parameter in net.parameters())
    if method:
        replace_linears(net, method, device_of("embed_out.weight", placement))
        net.cache_dtype = cache_dtype(net, method)
    on_cpu = all(torch.device(device).type == "cpu" for device in placement.values())
    net.bounds_shapes = on_cpu and not (method and cpu.level())  # our own kernels keep nothing
    # disable=None: a bar on a terminal, nothing in a log file
    with tqdm(total=total, unit="weights", unit_scale=True, desc="Loading", disable=None, leave=False) as bar:
        for name, tensor in checkpoint.read_tensors():
            owner, _, leaf = name.rpartition(".")
            module = net.get_submodule(owner)
            if leaf == "weight_packed":
                tensor = _packed(checkpoint, name, tensor)
            if isinstance(module, PackedLinear):
                module.take(leaf, tensor)
            else:
                # copy=True: the tensor read is a view of the file, which may be replaced while the model lives
                here = tensor.to(device_of(name, placement), dtype, copy=True)
                module.register_parameter(leaf, nn.Parameter(here, requires_grad=False))
            bar.update(tensor.numel())
            read += tensor.numel()
            if progress is not None:
                progress(read, total)
    if checkpoint.config.tie_word_embeddings:
        if method:
            net.embed_out.take("weight", net.gpt_neox.embed_in.weight)
        else:
            net.embed_out.weight = net.gpt_neox.embed_in.weight
    return net.eval()


def _packed(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight that is stored as it is multiplied; its numbers are looked at where no checksum covers them."""
    if not checkpoint.verification.compares and (problem := packed_problem(tensor, checkpoint.quantization)):
        raise CheckpointError(f"{checkpoint.tensors[name][0]}: {name} {problem}: the checkpoint is damaged")
    return tensor if checkpoint.mapped else tensor.clone()


def cache_dtype(net: GPTNeoX, method: str | None) -> torch.dtype | None:
    """Of the key/value cache: bfloat16 where the linear layers round more and the compiled library reads it."""
    rotary = net.gpt_neox.layers[0].attention.rotary
    if method in METHODS and cpu.attends(net.embed_out.device, torch.float32, rotary.head_width, rotary.width):
        return torch.bfloat16
    return None


def _quantization(checkpoint: Checkpoint, quantize: str | None) -> str | None:
    """The method of a quantised checkpoint, or the one asked for. Raises SettingError when they differ."""
    if checkpoint.quantization == "int8" and quantize == "int8-dynamic":
        return quantize
    if checkpoint.quantization and quantize not in (None, checkpoint.quantization):
        raise SettingError(
            f"{checkpoint.path}: is quantised to {checkpoint.quantization}; leave out quantize={quantize!r}, or "
            "give the checkpoint it was made from"
        )
    return checkpoint.quantization or quantize


def _packing(checkpoint: Checkpoint, dtype: torch.dtype, placement: dict[str, Any], quantize: str | None) -> str | None:
    """How the linear layers are kept: a name of `quantize=`, "bf16" (packed for our kernels), or None (torch's own)."""
    on_cpu = all(torch.device(device).type == "cpu" for device in placement.values())
    on_cuda = set(placement) == {""} and torch.device(placement[""]).type == "cuda"
    if quantize and not on_cpu and not on_cuda:
        places = ", ".join(sorted({str(device) for device in placement.values()}))
        raise HardwareError(
            f"quantize={quantize!r} is for the CPU or one CUDA device, not for {places}; "
            "use device='cpu' or device='cuda:0', or quantize=None"
        )
    if quantize == "int8-dynamic" and not (on_cpu and cpu.level()):
        raise HardwareError(
            "quantize='int8-dynamic' needs the compiled kernels for x86-64 CPUs; use quantize='int8': more exact"
        )
    if quantize and on_cpu and dtype == torch.float16:
        raise SettingError(f"quantize={quantize!r} computes in fp32 or bf16 on the CPU; use dtype='fp32'")
    if quantize or not on_cpu or not cpu.level():
        return quantize
    if dtype == torch.bfloat16:  # torch emulates it where the processor lacks it, many times slower than float32
        return None if cpu_computes_bf16() else "bf16"
    # The products of float32 from weights that take half the room and half the time to read: nothing is lost.
    return "bf16" if dtype == torch.float32 and _stored_in_bf16(checkpoint) else None


def _stored_in_bf16(checkpoint: Checkpoint) -> bool:
    """Whether all linear weights are bfloat16 in their files, and nothing is added to them."""
    if checkpoint.adapter:
        return False
    shapes = parameter_shapes(checkpoint.config)
    linear = [place for name, place in checkpoint.tensors.items() if is_linear(name, shapes[name])]
    files = {file: WeightFile(file) for file, _ in linear}
    types = {files[file].number_type(stored) for file, stored in linear}
    return types <= {"BF16", "torch.bfloat16"}
