"""Which device holds which part of a network, and whether it fits there. A placement is module name -> device, as
accelerate's device maps; "" is everything else.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from modelscope_dolly.checkpoint.memory import bytes_per_weight
from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.errors import HardwareError, SettingError, is_whole, shown, unknown_name
from modelscope_dolly.files import gigabytes
from modelscope_dolly.hardware import choose_device, dtype_name, free_memory

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig

log = logging.getLogger("modelscope.dolly")


def device_of(name: str, placement: dict[str, Any]) -> Any:
    """The device of the longest module name in `placement` that `name` begins with."""
    owners = [module for module in placement if not module or name == module or name.startswith(f"{module}.")]
    if not owners:
        raise SettingError(f"device_map gives no device for {name}; add an entry for it, or '' for all the rest")
    return placement[max(owners, key=len)]


def check_memory(net: GPTNeoX, dtype: torch.dtype, placement: dict[str, Any], method: str | None = None) -> None:
    """Raises HardwareError where the weights do not fit; `method` as for checkpoint.memory.bytes_per_weight."""
    needed: dict[torch.device, float] = {}
    for name, parameter in net.named_parameters():
        device = torch.device(device_of(name, placement))
        width = bytes_per_weight(name, parameter.shape, dtype.itemsize, method)
        needed[device] = needed.get(device, 0) + parameter.numel() * width
    for device, need in needed.items():
        if device.type in ("cpu", "cuda") and need > (free := free_memory(device)):
            raise HardwareError(
                f"the weights need {gigabytes(need)} on {device} in {method or dtype_name(dtype)}, "
                f"{gigabytes(free)} are free; use a smaller model, dtype='bf16', or device_map='auto' (see: dolly plan)"
            )


def check_device_map(device_map: object) -> None:
    """Raises SettingError unless it is "auto" or a dict of module names to devices that are here, "disk" among them."""
    if isinstance(device_map, str) and device_map == "auto":
        return
    if not isinstance(device_map, dict):
        raise SettingError(unknown_name("device_map", device_map, ("auto", "a dict of module names to devices")))
    for name, device in device_map.items():
        if not isinstance(name, str):
            raise SettingError(f"device_map: {shown(name)} is not the name of a module")
        if is_whole(device, 0, 1 << 16):  # accelerate's way to name a GPU
            device = f"cuda:{device}"
        if not (isinstance(device, str) and device == "disk"):
            choose_device("none" if device is None else device)


def plan_placement(config: NetworkConfig, dtype: torch.dtype, device_map: str | dict) -> dict[str, Any]:
    """Module name -> device; "auto" fills the CUDA devices in order, then the host.

    Raises:
        HardwareError: part of the model would land on disk, which makes each token minutes long.
        SettingError: neither "auto" nor a dict of module names to devices.
    """
    check_device_map(device_map)
    if isinstance(device_map, str):
        from accelerate import infer_auto_device_map

        with torch.device("meta"):
            net = GPTNeoX(config)
        device_map = infer_auto_device_map(net, no_split_module_classes=["Layer"], dtype=dtype)
    if "disk" in device_map.values():
        raise HardwareError(
            "the model does not fit into the memory of the devices and the host together; see: dolly plan"
        )
    return dict(device_map)


def spread(net: GPTNeoX, placement: dict[str, Any]) -> torch.device:
    """Let accelerate's hooks move activations between the devices; returns the device where token ids go in."""
    from accelerate import dispatch_model

    accelerators = [device for device in placement.values() if str(device) != "cpu"]
    layers = [name for name, device in placement.items() if ".layers." in name and str(device) == "cpu"]
    if accelerators and layers:
        log.warning(
            "%d layers are on the CPU and are copied to the GPU for every token: expect it to be slow", len(layers)
        )
    main = accelerators[0] if accelerators else "cpu"
    dispatch_model(net, placement, main_device=main, force_hooks=True)
    return torch.device(device_of("gpt_neox.embed_in.weight", placement))
