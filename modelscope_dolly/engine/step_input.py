"""What one pass through the network works on: whole prompts, one token of each slot, or several tokens of some slots.

Shapes: N tokens in this pass, B slots, H heads, D values per head.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from modelscope_dolly.engine.rotary import Rotary


class Span(NamedTuple):
    """A prompt, or a chunk of one, among the tokens of a prefill: tokens `begin` to `end` of the pass.

    `start` is the position of the first of them; the positions before it are in the cache, or come earlier in the pass.
    Logits are asked for of the last `rows` tokens.
    """

    slot: int
    begin: int
    end: int
    start: int = 0
    rows: int = 1


class VerifySpan(NamedTuple):
    """New tokens of a slot whose earlier tokens are in the cache: `count` of them from position `start` on."""

    slot: int
    start: int
    count: int


@dataclass
class StepInput:
    """Where the tokens of a pass belong.

    Attributes:
        positions: [N] place of each token in its own sequence.
        spans: of a prefill; None otherwise.
        length: number of cache places to look at: 1 + the largest position, or more if `padded`; 0 for a prefill.
        verify_spans: of a pass over several tokens of some slots, in the order of the slots and of the tokens.
        last_only: logits of the last token of each verify span instead of those of all N.
        padded: the number of places is fixed, because the step is captured.
    """

    positions: torch.Tensor
    spans: tuple[Span, ...] | None = None
    length: int = 0
    verify_spans: tuple[VerifySpan, ...] | None = None
    last_only: bool = False
    padded: bool = False
    _on: dict[torch.device, DeviceStepInput] = field(default_factory=dict, repr=False)

    @classmethod
    def prefill(cls, lengths: list[int], first_slot: int = 0) -> StepInput:
        """Whole prompts of these lengths, end to end without padding, for the slots from `first_slot` on."""
        return cls.chunks([(slot, 0, length, 1) for slot, length in enumerate(lengths, first_slot)])

    @classmethod
    def chunks(cls, chunks: list[tuple[int, int, int, int]]) -> StepInput:
        """(slot, first position, position behind the last, rows) of parts of prompts, end to end without padding."""
        ends = itertools.accumulate(end - start for _, start, end, _ in chunks)
        spans = tuple(
            Span(slot, at - (end - start), at, start, rows)
            for (slot, start, end, rows), at in zip(chunks, ends, strict=True)
        )
        return cls(torch.cat([torch.arange(start, end) for _, start, end, _ in chunks]), spans=spans)

    @classmethod
    def decode(cls, positions: list[int]) -> StepInput:
        """One new token in each of the first slots, at these positions."""
        return cls(torch.tensor(positions), length=max(positions) + 1)

    @classmethod
    def verify(cls, spans: list[tuple[int, int, int]], last_only: bool = False) -> StepInput:
        """Several new tokens of some slots; each span as VerifySpan."""
        spans = [VerifySpan(*span) for span in spans]
        positions = [position for _, start, count in spans for position in range(start, start + count)]
        return cls(torch.tensor(positions), length=max(positions) + 1, verify_spans=tuple(spans), last_only=last_only)

    def on(self, device: torch.device) -> DeviceStepInput:
        """The same on a device; made once per pass, since layers may be spread over several devices."""
        if device not in self._on:
            self._on[device] = DeviceStepInput(self, device)
        return self._on[device]

    def logit_rows(self) -> list[int] | None:
        """Which of the N tokens' logits are asked for; None: all."""
        if self.spans is not None:
            return [row for span in self.spans for row in range(span.end - span.rows, span.end)]
        if self.verify_spans is None or not self.last_only:
            return None
        return [end - 1 for end in itertools.accumulate(span.count for span in self.verify_spans)]


class DeviceStepInput:
    """A StepInput on one device. What a kind of attention needs is made when it first asks, for all layers.

    Attributes:
        step: where it comes from.
        positions: [N].
    """

    def __init__(self, step: StepInput, device: torch.device):
        self.step, self.device = step, device
        self.positions = step.positions.to(device)
        self._tables: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[torch.dtype, torch.Tensor] = {}

    def rotary_tables(self, rotary: Rotary, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [N, 1, 1, R], see Rotary."""
        if dtype not in self._tables:
            self._tables[dtype] = rotary(self.positions, dtype)
        return self._tables[dtype]

    @cached_property
    def slots(self) -> torch.Tensor:
        """[N] slot of each token."""
        if self.step.spans is not None:
            slots = [span.slot for span in self.step.spans for _ in range(span.begin, span.end)]
        elif self.step.verify_spans is not None:
            slots = [span.slot for span in self.step.verify_spans for _ in range(span.count)]
        else:
            return torch.arange(len(self.positions), device=self.device)
        return torch.tensor(slots, device=self.device)

    @cached_property
    def ends(self) -> torch.Tensor:
        """Prefill: int32 [spans + 1], 0 and where each prompt ends."""
        assert self.step.spans is not None
        return torch.tensor([0, *(span.end for span in self.step.spans)], dtype=torch.int32, device=self.device)

    @cached_property
    def grid(self) -> Grid:
        """Decode and verification: the tokens as a rectangle."""
        spans = self.step.verify_spans
        if spans is None:
            return Grid(self.slots, None, (len(self.positions), 1))
        offsets = torch.tensor([offset for span in spans for offset in range(span.count)], device=self.device)
        shape = (1 + max(span.slot for span in spans), max(span.count for span in spans))
        in_order = [span.count for span in spans] == [shape[1]] * shape[0]
        return Grid(self.slots, None if in_order else offsets, shape)

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[B, 1, M, length] added to attention scores in the grid: 0, or -inf for what lies ahead; None: sees all."""
        if self.grid.shape == (1, 1) and not self.step.padded:
            return None
        if dtype not in self._masks:
            grid = self.grid.fill(self.positions)
            hidden = torch.arange(self.step.length, device=self.device) > grid[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            self._masks[dtype] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[dtype]


class Grid(NamedTuple):
    """Tokens of a pass as a rectangle [B, M]: slots by the new tokens of the slot with the most.

    Attributes:
        slots: [N] row of each token.
        offsets: [N] column of each token; None where the tokens fill the rectangle in order.
        shape: (B, M).
    """

    slots: torch.Tensor
    offsets: torch.Tensor | None
    shape: tuple[int, int]

    def fill(self, values: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [B, M, ...]; zeros where a slot has fewer tokens."""
        if self.offsets is None:
            return values.view(*self.shape, *values.shape[1:])
        grid = values.new_zeros(*self.shape, *values.shape[1:])
        grid[self.slots, self.offsets] = values
        return grid

    def gather(self, grid: torch.Tensor) -> torch.Tensor:
        """[B, M, ...] -> [N, ...]."""
        return grid.flatten(0, 1) if self.offsets is None else grid[self.slots, self.offsets]
