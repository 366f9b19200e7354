"""Compiles the kernels of a decode step as a GPU gets them, on a machine without one, and says what came out.

    python compiled_kernels.py      one line of JSON for each variant and compute capability

Launches are recorded on tensors without memory. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modelscope_dolly.kernels import triton_decode as triton_kernels

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
#: Name: hidden size, heads.
SHAPES = {"3b": (2560, 32), "12b": (5120, 40)}
VOCABULARY = 50280
KINDS = ("plain", "int8", "int4")
launches: list[tuple] = []


class Recorded:
    """Takes the place of a kernel."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*values, num_warps: int, **constants):
            if "WIDE" in constants:
                constants["WIDE"] = False
            launches.append((self.kernel, grid, values, constants, num_warps))

        return launch


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stored(outputs: int, inputs: int, kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind == "int8":
        return empty(outputs, inputs, dtype=torch.int8), empty(outputs, dtype=torch.float32)
    if kind == "int4":
        scales = empty(outputs, -(-inputs // 128), dtype=torch.float16)
        return empty(outputs, -(-inputs // 2), dtype=torch.uint8), scales
    return empty(outputs, inputs, dtype=dtype), None


def linear(rows: int, outputs: int, inputs: int, kind: str, dtype: torch.dtype, gelu=False, add=False, bias=True):
    weight, scales = stored(outputs, inputs, kind, dtype)
    residual = empty(rows, outputs, dtype=dtype) if add else None
    bias = empty(outputs, dtype=torch.float32 if scales is not None else dtype) if bias else None
    x = empty(rows, inputs, dtype=dtype)
    triton_kernels.linear(x, weight, scales, bias, gelu=gelu, residual=residual)


def step(shape: str, rows: int, dtype: torch.dtype, kinds: tuple[str, ...] = (), ends: bool = False) -> None:
    """The launches of one layer and of the head. Without `ends`, one of those that differ by what follows the sum."""
    size, heads = SHAPES[shape]
    for kind in kinds:
        linear(rows, size, 4 * size, kind, dtype, add=True)
        if ends:
            linear(rows, 4 * size, size, kind, dtype, gelu=True)
            linear(rows, 3 * size, size, kind, dtype)
            linear(rows, VOCABULARY, size, kind, dtype, bias=False)
    norm = nn.LayerNorm(size, device="meta", dtype=dtype)
    triton_kernels.two_norms(empty(rows, size, dtype=dtype), norm, norm)
    width = size // heads
    qkv, turned = empty(rows, heads, 3, width, dtype=dtype), empty(rows, width // 4, dtype=dtype)
    cache = empty(rows, heads, 768, width, dtype=dtype)
    triton_kernels.attend(qkv, turned, turned, cache, cache, empty(rows, dtype=torch.int64))


def smallest() -> None:
    """Whole numbers that are 1 become constants of the code."""
    for kind in KINDS:
        linear(1, 1, 1, kind, torch.bfloat16, gelu=True, add=True)
    norm, qkv = nn.LayerNorm(1, device="meta", dtype=torch.float32), empty(1, 1, 3, 2, dtype=torch.float32)
    triton_kernels.two_norms(empty(1, 1, dtype=torch.float32), norm, norm)
    turned, cache = empty(1, 2, dtype=torch.float32), empty(1, 1, 1, 2, dtype=torch.float32)
    triton_kernels.attend(qkv, turned, turned, cache, cache, empty(1, dtype=torch.int64))


def source(kernel, values: tuple, constants: dict) -> ASTSource:
    """As Triton makes it of a call: pointers and numbers that 16 divides are marked, 1 and None are constants."""
    signature, fixed, marks = {}, {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, values, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "constexpr" if value is None or value == 1 else "fp32" if type(value) is float else "i32"
        if signature[name] == "constexpr":
            fixed[place,] = value
        elif isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            marks[place,] = [["tt.divisibility", 16]]
    for name, value in constants.items():
        signature[name], fixed[kernel.arg_names.index(name),] = "constexpr", value
    return ASTSource(kernel, signature=signature, constexprs=fixed, attrs=marks)


def report(kernel, grid: tuple, values: tuple, constants: dict, warps: int, capability: int) -> dict:
    target, made = GPUTarget("cuda", capability, 32), source(kernel, values, constants)
    compiled = triton.compile(made, target=target, options={"num_warps": warps})
    ptx, layouts = compiled.asm["ptx"], compiled.asm["ttgir"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "kernel": kernel.fn.__name__, "capability": capability, "grid": grid, "warps": warps,
        "constants": constants,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]), "shared": compiled.metadata.shared,
        "copies": [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+|\d+)[,;]", ptx)],
        "loads": re.findall(r"ld\.global\S*", ptx),
        "tensor_cores": re.findall(r"mma\.sync\S*", ptx),
        "layouts": sorted(set(re.findall(r"#ttg\.nvidia_mma<.*?>|kWidth = \d+", layouts))),
    }  # fmt: skip


def main() -> None:
    for name in ("_linear", "_two_norms", "_attend"):
        setattr(triton_kernels, name, Recorded(getattr(triton_kernels, name)))
    triton_kernels._interpreted = lambda: True  # takes tensors that are not on a GPU
    for shape in SHAPES:  # of the linear layers, both shapes make the same code
        for rows in (1, 16, 64):
            step(shape, rows, torch.bfloat16, KINDS, ends=rows == 1)
    step("3b", 1, torch.float16, ("plain", "int4"))
    step("3b", 1, torch.float32, KINDS)
    smallest()
    seen = set()
    for kernel, grid, values, constants, warps in launches:
        made = source(kernel, values, constants)
        key = (kernel.fn.__name__, warps, *map(str, (made.signature, made.constants, made.attrs)))
        for capability in (80, 90) if key not in seen else ():
            print(json.dumps(report(kernel, grid, values, constants, warps, capability)), flush=True)
        seen.add(key)


if __name__ == "__main__":
    main()
