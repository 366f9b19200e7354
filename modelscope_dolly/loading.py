"""Load a checkpoint directory: weights, tokenizer and engine on one device, or spread over several.

Knows nothing of ModelScope: model.py and pipeline.py adapt it, the command line uses it directly.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .checkpoint import Checkpoint, open_checkpoint
from .engine import Engine
from .errors import HardwareError, SettingError, unknown_name
from .generation import Responder
from .hardware import choose_device, choose_dtype, free_memory, gigabytes
from .neox import NeoX
from .weights import read_tensors

log = logging.getLogger("modelscope.dolly")


@dataclass(frozen=True)
class Dolly:
    """A loaded dolly-v2.

    Attributes:
        checkpoint: where it came from; with configuration and tokenizer.
        net: the network, its weights in `dtype`.
        device: where token ids go in.
        responder: answers prompts with it.
    """

    checkpoint: Checkpoint
    net: NeoX
    device: torch.device
    dtype: torch.dtype
    responder: Responder


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict | None = None,
    verify: bool = True,
) -> Dolly:
    """Load a checkpoint directory.

    Args:
        path: the directory; see checkpoint.locate for hub ids.
        device: see hardware.choose_device.
        dtype: "bf16", "fp16", "fp32", a torch.dtype, or None for what suits the device.
        device_map: "auto" or a dict, to spread the layers over several devices with accelerate; excludes `device`.
        verify: compare the files with manifest.json where there is one (sha256; seconds for a large model).

    Raises:
        CheckpointError, HardwareError, SettingError.
    """
    if device_map is not None and device not in (None, "gpu"):
        raise SettingError(f"device={device!r} and device_map={device_map!r} exclude each other; give one of them")
    chosen = choose_device(device)
    checkpoint = open_checkpoint(path, verify)
    chosen_dtype = choose_dtype(chosen.value, dtype, checkpoint.parameters)
    place, number = chosen.value, chosen_dtype.value
    if device_map is None:
        log.info("device %s; weights in %s", chosen, chosen_dtype)
        net = load_network(checkpoint, number, {"": place})
    else:
        placement = plan_placement(checkpoint, number, device_map)
        log.info("weights in %s over %s", chosen_dtype, sorted(map(str, set(placement.values()))))
        net = load_network(checkpoint, number, placement)
        place = _spread(net, placement)
    engine = Engine(net, place, checkpoint.config.max_position_embeddings)
    return Dolly(checkpoint, net, place, number, Responder(engine, checkpoint.tokenizer))


def load_network(checkpoint: Checkpoint, dtype: torch.dtype, placement: dict[str, Any]) -> NeoX:
    """Build the network and copy each tensor from its file straight to its device, in the final number type.

    Args:
        checkpoint: opened and checked.
        dtype: of the weights in memory.
        placement: module name -> device, as accelerate's device maps; "" is everything else.

    Raises:
        HardwareError: it does not fit; said before anything is read.
    """
    with torch.device("meta"):
        net = NeoX(checkpoint.config)
    _check_memory(net, dtype, placement)
    total = sum(parameter.numel() for parameter in net.parameters())
    # disable=None: a bar on a terminal, nothing in a log file
    with tqdm(total=total, unit="weights", unit_scale=True, desc="Loading", disable=None, leave=False) as bar:
        for name, tensor in read_tensors(checkpoint.tensors):
            # copy=True: the tensor read is a view of the file, which may be replaced while the model lives
            here = tensor.to(_place(name, placement), dtype, copy=True)
            module = net.get_submodule(name.rpartition(".")[0])
            module.register_parameter(name.rpartition(".")[2], nn.Parameter(here, requires_grad=False))
            bar.update(tensor.numel())
    if checkpoint.config.tie_word_embeddings:
        net.embed_out.weight = net.gpt_neox.embed_in.weight
    return net.eval()


def _place(name: str, placement: dict[str, Any]) -> Any:
    """The device of the longest module name in `placement` that `name` begins with."""
    owners = [module for module in placement if not module or name == module or name.startswith(f"{module}.")]
    if not owners:
        raise SettingError(f"device_map gives no device for {name}; add an entry for it, or '' for all the rest")
    return placement[max(owners, key=len)]


def _check_memory(net: NeoX, dtype: torch.dtype, placement: dict[str, Any]) -> None:
    needed: dict[torch.device, int] = {}
    for name, parameter in net.named_parameters():
        device = torch.device(_place(name, placement))
        needed[device] = needed.get(device, 0) + parameter.numel() * dtype.itemsize
    for device, need in needed.items():
        if device.type in ("cpu", "cuda") and need > (free := free_memory(device)):
            raise HardwareError(
                f"the weights need {gigabytes(need)} on {device} in {str(dtype).removeprefix('torch.')}, "
                f"{gigabytes(free)} are free; use a smaller model, dtype='bf16', or device_map='auto' (see: dolly plan)"
            )


def plan_placement(checkpoint: Checkpoint, dtype: torch.dtype, device_map: str | dict) -> dict[str, Any]:
    """Module name -> device; "auto" fills the CUDA devices in order, then the host.

    Raises:
        HardwareError: part of the model would land on disk, which makes each token minutes long.
        SettingError: neither "auto" nor a dict.
    """
    if isinstance(device_map, str):
        if device_map != "auto":
            raise SettingError(unknown_name("device_map", device_map, ("auto", "a dict of module names to devices")))
        from accelerate import infer_auto_device_map

        with torch.device("meta"):
            net = NeoX(checkpoint.config)
        device_map = infer_auto_device_map(net, no_split_module_classes=["Layer"], dtype=dtype)
    if "disk" in device_map.values():
        raise HardwareError(
            "the model does not fit into the memory of the devices and the host together; see: dolly plan"
        )
    return dict(device_map)


def _spread(net: NeoX, placement: dict[str, Any]) -> torch.device:
    """Let accelerate's hooks move activations between the devices; returns where token ids go in."""
    from accelerate import dispatch_model

    accelerators = [device for device in placement.values() if str(device) != "cpu"]
    layers = [name for name, device in placement.items() if ".layers." in name and str(device) == "cpu"]
    if accelerators and layers:
        log.warning(
            "%d layers are on the CPU and are copied to the GPU for every token: expect it to be slow", len(layers)
        )
    main = accelerators[0] if accelerators else "cpu"
    dispatch_model(net, placement, main_device=main, force_hooks=True)
    return torch.device(_place("gpt_neox.embed_in.weight", placement))
