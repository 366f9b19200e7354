"""Without a CUDA device, Triton's interpreter runs kernels on CPU tensors. To be imported before any kernel is defined.

It has no arithmetic on bfloat16: triton_kernels widens to float32 under it, which is exact. Two things are mended here.
"""

from __future__ import annotations

import os

import numpy
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        from triton.runtime import interpreter
    except ImportError:
        interpreter = None
    if hasattr(interpreter, "_patch_lang_tensor"):
        patch_tensor, cast = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl

        def patched(tensor, scope):
            """Bounds of loops are arrays of one number, which numpy from 2.4 on does not take for a number."""
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        def rounded(self, source, target):
            """float32 to bfloat16 cuts bits off; a GPU rounds to nearest."""
            if (source.dtype.scalar.name, target.scalar.name) != ("fp32", "bf16"):
                return cast(self, source, target)
            data = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(data.numpy().view(numpy.uint16), target.scalar)

        interpreter._patch_lang_tensor = patched
        interpreter.InterpreterBuilder.cast_impl = rounded
