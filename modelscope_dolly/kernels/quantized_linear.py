"""Linear layers with packed weights: quantised to int8 or int4, or bfloat16 in the order in which they are multiplied.

int8: one scale per output, activations in 16 bits per token when they arrive (W8A16). int8-dynamic: the same weights,
activations in 8 bits (W8A8): half of the arithmetic, and a far larger error where a few channels of the activations are
much larger than the rest (Dettmers et al. 2022, arXiv:2208.07339). int4: one scale per 128 inputs of an output, 8-bit
activations (W4A8). Rounding is to nearest, symmetric around zero, without calibration data, so a tensor can be
quantised while it streams in. bf16 is exact: the same weights, multiplied in float32.

Stored in a checkpoint (see checkpoint/quantize.py) in the order of csrc/linear.c, so that the file is mapped and
multiplied as it is, in the place of NAME.weight:
    NAME.weight_packed int32 [ceil(N / 16), W, 16]; a word holds, little end first,
          int8  4 inputs, each with an offset of 128; W = ceil(K / 4)
          int4  8 inputs, each with an offset of 8, input j in the low half of byte j, j + 4 in its high half;
                W = 16 ceil(K / 128)
    NAME.weight_scale  int8: float32 [N]; int4: float16 [N, ceil(K / 128)]
    and config.json: {"model_type": "gpt_neox_dolly_quantized",
                      "quantization_config": {"quant_method": "dolly-int8" or "dolly-int4", "version": 2}}
          so that a reader that does not know it refuses (transformers' Auto classes for its model_type) instead of
          running a network whose linear layers it has not found.
Version 1, which is still read, has rows that are packed when they are loaded:
    int8  NAME.weight_int8 int8 [N, K]
    int4  NAME.weight_int4 uint8 [N, ceil(K / 2)], input 2 j in the low half of byte j, with an offset of 8

Where the compiled library is missing (see cpu.py) and on CUDA, the numbers are kept as they are stored and
activations stay as they are (weight-only), which is more exact; int8-dynamic is refused there. torch then widens the
weights chunk by chunk: several times slower, except for long prompts. Captured steps read them with kernels of their
own instead, see triton_decode.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from modelscope_dolly.errors import CheckpointError, SettingError, unknown_name
from modelscope_dolly.kernels import cpu as kernels
from modelscope_dolly.kernels.cpu import GROUP

#: model_type in config.json of a quantised checkpoint.
MODEL_TYPE = "gpt_neox_dolly_quantized"
#: Names of `quantize=`.
METHODS = ("int8", "int8-dynamic", "int4")
#: Those of them that say how weights are stored.
STORED_METHODS = ("int8", "int4")
#: Bytes of one weight of a linear layer. int4 has a scale of two bytes per group; the scales of int8 count for nothing.
BYTES_PER_WEIGHT = {"int8": 1.0, "int8-dynamic": 1.0, "int4": 0.5 + 2 / GROUP, "bf16": 2.0}
#: Outputs that the torch fallback widens at a time: bounds its memory.
_CHUNK = 4096
#: A row or group without a larger value counts as zero; the same limit is in csrc/linear.c.
_SMALLEST = 1e-30
#: Of quantization_config: rows, or words in the order in which they are multiplied.
ROWS, PACKED = VERSIONS = (1, 2)
#: Four int8 weights of 0.
_ZEROS = 0x80808080 - (1 << 32)


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of the network is the weight of a linear layer, which is what is quantised."""
    return len(shape) == 2 and "embed_in" not in name


def parse_quantize(name: str | None) -> str | None:
    """One of METHODS, or None for None and "none". Raises SettingError."""
    if name is None or (isinstance(name, str) and name == "none"):
        return None
    if not isinstance(name, str) or name not in METHODS:
        raise SettingError(unknown_name("quantize", name, ("none", *METHODS)))
    return name


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> whole numbers int8 [N, K] from -127 to 127, scales float32 [N]."""
    largest = weight.float().abs().amax(dim=1)
    # torch.div: `127.0 / largest` would be rounded twice (a reciprocal, times 127), unlike in linear.c
    inverse = torch.where(largest > _SMALLEST, torch.div(torch.tensor(127.0), largest), 0.0)
    scales = torch.where(largest > _SMALLEST, largest / 127.0, 0.0)
    return (weight.float() * inverse[:, None]).round().to(torch.int8), scales


def quantise_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> whole numbers int8 [N, K] from -8 to 7, scales float16 [N, ceil(K / 128)].

    The value of largest size in a group becomes -8, so that all 16 levels are used (as llama.cpp's q4_0 does).
    """
    rows, inputs = weight.shape
    groups = F.pad(weight.float(), (0, -inputs % GROUP)).view(rows, -1, GROUP)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = (largest / -8.0).to(torch.float16)
    inverse = torch.where(scales != 0, 1.0 / scales.float(), 0.0)
    whole = (groups * inverse).round().clamp(-8, 7).to(torch.int8)
    return whole.view(rows, -1)[:, :inputs].contiguous(), scales.squeeze(2)


def stored_shapes(
    shapes: Mapping[str, tuple[int, ...]], method: str | None, version: int = PACKED
) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a checkpoint that is quantised so, from those of an ordinary one."""
    if method is None:
        return dict(shapes)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if not is_linear(name, shape):
            found[name] = shape
            continue
        rows, inputs = shape
        groups = -(-inputs // GROUP)
        if version == PACKED:
            words = -(-inputs // 4) if method == "int8" else groups * (GROUP // 8)
            found[f"{name}_packed"] = (-(-rows // 16), words, 16)
        else:
            found[f"{name}_{method}"] = shape if method == "int8" else (rows, -(-inputs // 2))
        found[f"{name}_scale"] = (rows,) if method == "int8" else (rows, groups)
    return found


def stored_tensors(name: str, weight: torch.Tensor, method: str, version: int = PACKED) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the linear weight `name` [N, K]."""
    if method == "int8":
        whole, scales = kernels.quantise_rows(weight) if kernels.level() else quantise_int8(weight)
        whole = whole[:, : weight.shape[1]].contiguous()
    else:
        whole, scales = quantise_int4(weight)
    if version == PACKED:
        stored = {f"{name}_packed": _pack_int8(whole) if method == "int8" else _pack_int4(whole)}
    else:
        stored = {f"{name}_{method}": whole if method == "int8" else _halves(whole)}
    return {**stored, f"{name}_scale": scales}


def packed_problem(packed: torch.Tensor, method: str) -> str | None:
    """What is wrong with the numbers of a stored tensor: int8 has a number too many, and it is no layer of zeros."""
    if method == "int8" and not int(packed.view(torch.uint8).min()):
        return "holds -128, the smallest number of int8 weights is -127"
    if method == "int8" and bool((packed == _ZEROS).all()):
        return "is all zeros"
    return None


def _pack_int8(whole: torch.Tensor) -> torch.Tensor:
    """Numbers from -127 to 127 int8 [N, K] -> [N/16, K/4, 16]."""
    padded = F.pad(whole, (0, -whole.shape[1] % 4)) if whole.shape[1] % 4 else whole.clone()
    return kernels.pack(_with_offset(padded), padding=_ZEROS)


def _unpack_int8(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    words = kernels.unpack(packed, outputs).contiguous()
    return words.view(torch.uint8).bitwise_xor(128).view(torch.int8)[:, :inputs].contiguous()


def _pack_int4(whole: torch.Tensor) -> torch.Tensor:
    """Numbers from -8 to 7 int8 [N, K] -> [N/16, 16 K/128, 16]. Levels are 0 to 15; a padded place holds 8: zero."""
    levels = F.pad((whole + 8).view(torch.uint8), (0, -whole.shape[1] % GROUP), value=8)
    levels = levels.view(len(whole), -1, 2, 4)
    words = (levels[:, :, 0] | (levels[:, :, 1] << 4)).contiguous()
    return kernels.pack(words.view(torch.int32).view(len(whole), -1))


def _unpack_int4(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    halves = kernels.unpack(packed, outputs).contiguous().view(torch.uint8).view(outputs, -1, 1, 4)
    return torch.cat((halves & 15, halves >> 4), dim=2).view(outputs, -1)[:, :inputs].contiguous().view(torch.int8) - 8


def _halves(whole: torch.Tensor) -> torch.Tensor:
    """Numbers from -8 to 7 [N, K] -> their stored form, two in a byte [N, ceil(K / 2)]."""
    levels = F.pad((whole + 8).view(torch.uint8), (0, whole.shape[1] % 2), value=8)
    return levels[:, 0::2] | (levels[:, 1::2] << 4)


class PackedLinear(nn.Module):
    """Takes the place of an nn.Linear. Its tensors arrive one by one through `take`.

    Attributes:
        weight: what `forward` multiplies with: in the layout of linear.c if `packed`, else as stored.
        scales: of the weights, or None.
        bias: float32 [N], or None.
        device: of all of them.
    """

    kind: int
    #: Of an activation, when the compiled library quantises it.
    row_bytes = 2
    weight: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, device: str | torch.device = "cpu"):
        super().__init__()
        if in_features > kernels.LARGEST_K:
            raise SettingError(
                f"a layer of {in_features} inputs cannot be packed: the limit is {kernels.LARGEST_K}; "
                "use quantize=None and dtype='fp32'"
            )
        self.in_features, self.out_features, self.device = in_features, out_features, torch.device(device)
        for name in ("weight", "scales", "bias"):
            self.register_buffer(name, None)

    @property
    def packed(self) -> bool:
        """Whether the compiled library computes this layer."""
        return self.device.type == "cpu" and kernels.level() > 0

    @property
    def fuses_gelu(self) -> bool:
        """Whether `forward` takes activation="gelu"."""
        return self.packed

    def take(self, leaf: str, tensor: torch.Tensor) -> None:
        """A tensor of a checkpoint, of any float type or as stored above: weight, weight_packed, ... or bias.

        It may be a view of a file: weight_packed is kept as it is where the compiled library multiplies it.

        Raises:
            CheckpointError: a stored tensor holds numbers that quantisation does not make.
        """
        if leaf == "bias":
            self.bias = tensor.to(self.device, torch.float32, copy=True)
        elif leaf == "weight":
            self._pack(*self.quantise(tensor.to(self.device)))
        elif leaf == "weight_scale":
            self._take_scales(tensor.to(self.device, copy=True))
        elif leaf == "weight_packed" and self.packed:
            self.weight = tensor
        elif leaf == "weight_packed":
            self._pack(self._unpack(tensor, self.out_features, self.in_features).to(self.device), None)
        else:
            self._pack(self._whole(tensor).to(self.device), None)

    def quantise(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [N, K] -> numbers [N, K] and scales."""
        raise NotImplementedError

    def _whole(self, stored: torch.Tensor) -> torch.Tensor:
        """Numbers [N, K] from their stored form."""
        raise NotImplementedError

    _unpack: Callable[[torch.Tensor, int, int], torch.Tensor]  # numbers [N, K] from words, N and K

    def _pack(self, whole: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Keep numbers and, unless they come by themselves, scales, in the layout of `forward`."""
        raise NotImplementedError

    def _take_scales(self, scales: torch.Tensor) -> None:
        self.scales = scales

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Weights of the outputs begin:end in float32 [end - begin, K], for the torch fallback."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """x [..., K] in float32 or bfloat16 -> [..., N] in the same type; activation: see kernels.linear, if packed."""
        if self.packed:
            rows, tensors = x.reshape(-1, self.in_features), (self.weight, self.scales, self.bias)
            out = kernels.linear(self.kind, rows, *tensors, self.out_features, activation, row_bytes=self.row_bytes)
            return out.view(*x.shape[:-1], self.out_features)
        parts = []
        wide = torch.float32 if self.device.type == "cpu" else x.dtype
        for begin in range(0, self.out_features, _CHUNK):
            end = min(begin + _CHUNK, self.out_features)
            bias = self.bias[begin:end].to(wide) if self.bias is not None else None
            parts.append(F.linear(x.to(wide), self.rows(begin, end).to(wide), bias))
        return torch.cat(parts, dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(PackedLinear):
    """One byte per weight, one scale per output."""

    kind = kernels.INT8
    _unpack = staticmethod(_unpack_int8)

    def take(self, leaf: str, tensor: torch.Tensor) -> None:
        if leaf == "weight" and self.packed:  # in one go: quantised straight into the packed layout
            panels, self.scales = kernels.quantise_rows(tensor, panel=16)
            self.weight = _with_offset(panels).squeeze(-1)
        else:
            super().take(leaf, tensor)

    def quantise(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantise_int8(weight)

    def _whole(self, stored: torch.Tensor) -> torch.Tensor:
        if int(stored.min()) < -127:
            raise CheckpointError("an int8 weight is -128; the smallest is -127: the checkpoint is damaged")
        return stored.clone()

    def _pack(self, whole: torch.Tensor, scales: torch.Tensor | None) -> None:
        self.weight = _pack_int8(whole) if self.packed else whole
        if scales is not None:
            self.scales = scales

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.weight[begin:end].float() * self.scales[begin:end, None]


class Int8DynamicLinear(Int8Linear):
    """The weights of Int8Linear, with activations of 8 bits."""

    row_bytes = 1


class Int4Linear(PackedLinear):
    """Half a byte per weight, one float16 scale per 128 inputs of an output, activations of 8 bits."""

    kind = kernels.INT4
    row_bytes = 1
    _unpack = staticmethod(_unpack_int4)

    def quantise(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantise_int4(weight)

    def _whole(self, stored: torch.Tensor) -> torch.Tensor:
        levels = torch.stack((stored & 15, stored >> 4), dim=2).view(stored.shape[0], -1)
        return levels[:, : self.in_features].view(torch.int8) - 8

    def _pack(self, whole: torch.Tensor, scales: torch.Tensor | None) -> None:
        self.weight = _pack_int4(whole) if self.packed else _halves(whole)
        if scales is not None:
            self._take_scales(scales)

    def _take_scales(self, scales: torch.Tensor) -> None:
        if self.packed:
            padded = F.pad(scales, (0, 0, 0, -self.out_features % 16))
            scales = padded.view(-1, 16, scales.shape[1]).transpose(1, 2).contiguous()
        self.scales = scales

    def rows(self, begin: int, end: int) -> torch.Tensor:
        scales = self.scales[begin:end].float().repeat_interleave(GROUP, dim=1)
        return self._whole(self.weight[begin:end]).float() * scales[:, : self.in_features]


class BF16Linear(PackedLinear):
    """bfloat16 weights as they are, multiplied in float32."""

    kind = kernels.BF16

    def quantise(self, weight: torch.Tensor) -> tuple[torch.Tensor, None]:
        return weight.to(torch.bfloat16), None

    def _pack(self, whole: torch.Tensor, scales: torch.Tensor | None) -> None:
        if self.packed:
            whole = F.pad(whole, (0, self.in_features % 2)).contiguous()
            self.weight = kernels.pack(whole.view(torch.int32))
        else:
            self.weight = whole.clone()

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.weight[begin:end].float()


_CLASSES: dict[str, type[PackedLinear]] = {
    "int8": Int8Linear, "int8-dynamic": Int8DynamicLinear, "int4": Int4Linear, "bf16": BF16Linear,
}  # fmt: skip


def _with_offset(whole: torch.Tensor) -> torch.Tensor:
    """int8 [..., 4 n] -> unsigned with an offset of 128, in place, as 32-bit words [..., n]."""
    return whole.view(torch.uint8).bitwise_xor_(128).view(torch.int32)


def replace_linears(net: nn.Module, method: str, device: str | torch.device = "cpu") -> None:
    """Put an empty packed layer for `device` in the place of every nn.Linear of `net` (which lies on "meta")."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear):
            packed = _CLASSES[method](module.in_features, module.out_features, device)
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, packed)
