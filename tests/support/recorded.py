"""A stand-in for a CUDA graph: it records every operation of a step with the tensors it works on, and runs them again.

As with a graph, numbers and shapes that Python knew while recording are fixed, results of a replay lie where those of
the recording lay, and what leaves the tensors (a number for the host) is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}


class Recorder(TorchDispatchMode):
    """Called with a step, as cuda_graphs.GraphCapture's `capture`."""

    def __init__(self):
        super().__init__()
        self.recordings = self.launches = 0
        self._on = False
        self._calls: list[tuple[Callable, tuple, dict, list]] = []

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        step()
        self._calls = calls = []
        with self:
            self._on = True
            step()
        self._on = False
        self.recordings += 1

        def replay() -> None:
            for function, arguments, keywords, kept in calls:
                results = tensors(function(*arguments, **keywords))
                for old, new in zip(kept, results, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name
        assert name not in HOST, f"{name} waits for the host inside a recorded step"
        return self.note(function, arguments, keywords or {})

    def noting(self, kernel: Callable) -> Callable:
        """A kernel that torch does not launch, as one operation of the recording."""

        def launch(*arguments, **keywords):
            if not self._on:
                return kernel(*arguments, **keywords)
            self.launches += 1
            self._on = False
            try:
                with _disable_current_modes():
                    return self.note(kernel, arguments, keywords)
            finally:
                self._on = True

        return launch

    def note(self, function: Callable, arguments: tuple, keywords: dict):
        result = function(*arguments, **keywords)
        self._calls.append((function, arguments, keywords, tensors(result)))
        return result


def tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


class on_one_device(TorchDispatchMode):
    """No operation may touch a tensor of another device; single numbers may come along, as for CUDA."""

    def __init__(self, device: str):
        super().__init__()
        self._device = torch.device(device)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tensors((arguments, keywords or {}, result)):
            assert tensor.device == self._device or not tensor.dim(), f"{function} touches {tensor.device}"
        return result
