"""Keys and values of earlier tokens."""

from __future__ import annotations

import torch

#: Keys and values [H, places, D] of a slot, by layer.
SavedSlot = dict[int, tuple[torch.Tensor, torch.Tensor]]


class KVCache:
    """Keys and values of all layers: per layer two tensors [B, H, length, D], made where and when a layer first writes.

    Slots in use are kept at the front (0 .. n-1), so that a step over n of them needs no gathering.

    Args:
        slots: B.
        length: places of a slot.
        dtype: of keys and values; None is that of the layer.

    Attributes:
        version: changes whenever the tensors are at other addresses.
    """

    def __init__(self, slots: int = 0, length: int = 0, dtype: torch.dtype | None = None):
        self.slots, self.length, self.dtype = slots, length, dtype
        self.version = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer_cache(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer; `like` [N, H, D] gives heads, width, device and the number type by default."""
        if index not in self._layers:
            # Zeros, not empty: a masked place is multiplied by a weight of 0, and 0 * NaN would be NaN.
            shape = (self.slots, like.shape[1], self.length, like.shape[2])
            self._layers[index] = (like.new_zeros(shape, dtype=self.dtype), like.new_zeros(shape, dtype=self.dtype))
        return self._layers[index]

    @torch.inference_mode()  # the tensors were made inside a step
    def move(self, source: int, target: int, places: int | None = None) -> None:
        """Copy one slot over another, or its first `places`."""
        for keys, values in self._layers.values():
            keys[target, :, :places].copy_(keys[source, :, :places])
            values[target, :, :places].copy_(values[source, :, :places])

    @torch.inference_mode()
    def save(self, slot: int, places: int) -> SavedSlot:
        """A copy of the first `places` of a slot."""
        layers = self._layers.items()
        return {i: (keys[slot, :, :places].clone(), values[slot, :, :places].clone()) for i, (keys, values) in layers}

    @torch.inference_mode()
    def restore(self, saved: SavedSlot, slot: int) -> None:
        """Write what `save` has copied into a slot."""
        for index, pair in saved.items():
            for layer, copy in zip(self.layer_cache(index, pair[0].transpose(0, 1)), pair, strict=True):
                layer[slot, :, : copy.shape[1]].copy_(copy)

    @torch.inference_mode()
    def resize(self, slots: int, length: int, used: int = 0) -> None:
        """Another number of slots and places; what the first `used` slots hold is kept, as far as it fits.

        Layer by layer, so that no more than one layer is in memory twice.
        """
        if (slots, length) == (self.slots, self.length):
            return
        kept = min(length, self.length)
        self.slots, self.length, self.version = slots, length, self.version + 1
        if not used:
            self._layers.clear()
        for index, pair in self._layers.items():
            resized = []
            for old in pair:
                new = old.new_zeros(slots, old.shape[1], length, old.shape[3])
                new[:used, :, :kept].copy_(old[:used, :, :kept])
                resized.append(new)
            self._layers[index] = (resized[0], resized[1])
