"""Decode steps of one network on one CUDA device, captured as CUDA graphs and replayed.

At batch 1 a step of a small model takes about a millisecond, and launching its hundreds of kernels from Python takes
several. So a step is captured once for each batch size and replayed with a single launch.

1. A step reads its input from tensors at fixed addresses (`StepBuffers`), draws the next tokens on the device
   (sampling.draw) and writes them where the next step reads them. Nothing in it waits for the host or depends on the
   host's numbers.
2. So several steps run before the host looks at what was drawn. Tokens behind the end of a sequence are discarded;
   their keys and values lie in a slot that is free by then.
3. Two forwards can be captured: the fused one of gpt_neox_fused.py, and the network's own, looking at the whole cache
   under a mask.
4. Before a graph is used, its logits are compared with those of the ordinary step on the same input. One that fails,
   or differs by more than rounding, is given up with a warning; without any, the engine computes step by step.
5. Graphs hold the addresses of a key/value cache. It stays while it is large enough; with another, all are made anew.

Capturing and replaying follow torch's manual ("CUDA graphs", torch.cuda.graph). Tests run all of this but the graph
itself on the CPU; it has not run on a GPU yet.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import torch

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.gpt_neox_fused import can_fuse, fused_forward
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.runner import check_finite
from modelscope_dolly.engine.sampling import draw
from modelscope_dolly.engine.sequence import Sequence
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.engine.step_timer import StepTimer
from modelscope_dolly.errors import SettingError, one_line, unknown_name
from modelscope_dolly.kernels import triton_decode
from modelscope_dolly.kernels.self_test import distance

log = logging.getLogger("modelscope.dolly")

#: The host looks at the drawn tokens at least this often: steps, and seconds.
BURST, BURST_SECONDS = 16, 0.03
#: Cache lengths are rounded up to this, so that runs of about the same length share graphs.
CACHE_STEP = 256
#: Distance between the logits of a graph and of the ordinary step, as a share of their spread. bfloat16 rounds to
#: 0.4 %, and errors add up over the layers; a wrong kernel is off by more than all of the spread.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_IN_HALF = 0.1

#: Values of $DOLLY_DECODE: the fused kernels if they can be used, graphs of torch's own kernels, no graphs.
DECODE_MODES = ("fused", "recorded", "plain")

#: (tokens [B], positions [B], cache) -> logits [B, V].
Forward = Callable[[torch.Tensor, torch.Tensor, KVCache], torch.Tensor]
#: Runs a step a few times, captures it, and returns what replays it.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class GraphCapture:
    """The engine's `capture`: decode steps of a network as CUDA graphs.

    Args:
        net: all of it on `device`.
        device: of the network.
        capture: makes a graph of a step; another one than for CUDA is for tests.
    """

    cache_step = CACHE_STEP

    def __init__(self, net: GPTNeoX, device: torch.device, capture: Capture | None = None):
        self.net, self.device = net, device
        self.capture = capture or _CudaCapture(device)
        self.forwards: list[tuple[str, Forward]] = [("torch's kernels", self._plain)]  # the one in use is the first
        if decode_mode() == "fused" and can_fuse(net) and triton_decode.usable(device):
            self.forwards.insert(0, ("the fused kernels", self._fused))
        self._graphs: CapturedGraphs | None = None

    def slots(self, slots: int) -> int:
        """A cache has as many slots as a graph has rows."""
        return batch_size(slots)

    def replay(
        self, sequences: list[Sequence], cache: KVCache, timer: StepTimer, one_step: bool
    ) -> list[list[int]] | None:
        """See runner.StepCapture. Call it with gradients off and the device to itself."""
        if not all(sequence.sampler.capturable for sequence in sequences):
            return None
        if self._graphs is None or self._graphs.cache is not cache or self._graphs.version != cache.version:
            self._graphs = None  # its memory may be what the new ones need
            self._graphs = CapturedGraphs(self, cache)
        buffers = self._graphs.prepare(sequences)
        if buffers is None:
            return None
        steps = 1
        if not one_step and timer.knows(len(sequences)):
            steps = burst(timer.seconds(len(sequences)), [sequence.remaining for sequence in sequences])
        begun = time.perf_counter()
        ids = buffers.run(sequences, steps)
        timer.add(len(sequences), (time.perf_counter() - begun) / steps)
        return ids

    def _plain(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.net(tokens, StepInput(positions, length=cache.length, padded=True), cache)

    def _fused(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if len(tokens) > triton_decode.LARGEST_M:
            return self._plain(tokens, positions, cache)
        return fused_forward(self.net, tokens, positions, cache)


class CapturedGraphs:
    """The captured steps over one cache, by batch size and by what sampling needs."""

    def __init__(self, owner: GraphCapture, cache: KVCache):
        self.cache, self.version = cache, cache.version
        self._owner = owner
        self._buffers: dict[tuple[int, bool, bool], StepBuffers] = {}
        self._checked: set[int] = set()  # batch sizes

    def prepare(self, sequences: list[Sequence]) -> StepBuffers | None:
        """What runs steps for these sequences: captured and checked if it is new (seconds).

        None: nothing can be captured here.
        """
        sampled = any(sequence.sampler.sampling.do_sample for sequence in sequences)
        penalised = any(sequence.sampler.seen is not None for sequence in sequences)
        size = min(batch_size(len(sequences)), self.cache.slots)
        key = (size, sampled, penalised)
        while key not in self._buffers and self._owner.forwards:
            name, forward = self._owner.forwards[0]
            try:
                buffers = StepBuffers(self._owner, self.cache, forward, *key)
                buffers.capture(sequences)
                if size not in self._checked:
                    self._check(buffers, sequences)
                    self._checked.add(size)
                self._buffers[key] = buffers
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler that is missing, an old driver, a kernel that the card lacks
                reason = f"{type(error).__name__}: {one_line(error)}"
                log.warning("%s cannot be used on %s (%s)", name, self._owner.device, reason)
                del self._owner.forwards[0]
                self._buffers.clear()
                self._checked.clear()
        return self._buffers.get(key)

    def _check(self, buffers: StepBuffers, sequences: list[Sequence]) -> None:
        """Compare a captured step with the ordinary one. Raises ArithmeticError."""
        net, device = self._owner.net, self._owner.device
        positions = [len(sequence.ids) - 1 for sequence in sequences]
        tokens = torch.tensor([sequence.ids[-1] for sequence in sequences], device=device)
        expected = net(tokens, StepInput.decode(positions), self.cache)
        buffers.fill(sequences)
        buffers.replay()
        assert buffers.logits is not None
        error = distance(buffers.logits[: len(sequences)], expected)
        if not error <= _TOLERANCE.get(expected.dtype, _TOLERANCE_IN_HALF):  # also NaN
            raise ArithmeticError(f"its logits are {error:.2g} of their spread away from the ordinary step")


class StepBuffers:
    """What a captured step reads and writes, at fixed addresses on the device; B sequences.

    Attributes:
        numbers: int64 [6, B]: token, position, then the whole numbers of Sampler.settings.
        others: float32 [3, B]: the other numbers of Sampler.settings.
        seen: bool [B, V], see sampling.draw.
        drawn: int64 [BURST, B], the drawn ids; row `row` is written next.
        finite: whether all logits were finite.
        logits: of the last step, [B, V].
    """

    def __init__(
        self, owner: GraphCapture, cache: KVCache, forward: Forward, size: int, sampled: bool, penalised: bool
    ):
        self._owner, self._cache, self._forward, self._sampled = owner, cache, forward, sampled
        device = owner.device
        self.numbers = torch.zeros(6, size, dtype=torch.int64, device=device)
        self.others = torch.ones(3, size, device=device)
        vocabulary = owner.net.config.vocab_size
        self.seen = torch.zeros(size, vocabulary, dtype=torch.bool, device=device) if penalised else None
        self.drawn = torch.zeros(BURST, size, dtype=torch.int64, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.logits: torch.Tensor | None = None
        self.replay: Callable[[], None] = self.step

    def run(self, sequences: list[Sequence], steps: int) -> list[list[int]]:
        """The next `steps` ids of each sequence.

        Raises:
            HardwareError: the network's output is not finite.
        """
        assert 1 <= steps <= BURST, steps
        self.fill(sequences)
        for _ in range(steps):
            self.replay()
        drawn, finite = self.drawn[:steps].cpu(), bool(self.finite)  # the host waits here
        assert self.logits is not None
        check_finite(finite, self.logits, self._owner.device)
        return drawn.T.tolist()[: len(sequences)]

    def fill(self, sequences: list[Sequence]) -> None:
        """Copy the state of the sequences to the device; the output of rows without one is discarded."""
        settings = [sequence.sampler.settings() for sequence in sequences]
        rows = [
            (sequence.ids[-1], len(sequence.ids) - 1, *whole)
            for sequence, (whole, _) in zip(sequences, settings, strict=True)
        ]
        self.numbers[:, : len(sequences)].copy_(torch.tensor(rows).T)
        self.numbers[:, len(sequences) :].zero_()
        self.others[:, : len(sequences)].copy_(torch.tensor([others for _, others in settings]).T)
        self.row.zero_()
        self.finite.fill_(True)
        if self.seen is not None:
            self.seen.zero_()
            seen = [(row, token) for row, sequence in enumerate(sequences) for token in sequence.sampler.seen or ()]
            if seen:
                rows, tokens = torch.tensor(seen, device=self.seen.device).T
                self.seen[rows, tokens] = True

    def capture(self, sequences: list[Sequence]) -> None:
        """Make `replay` a graph. It begins from the sequences' state: their slots are written."""
        self.fill(sequences)
        self.replay = self._owner.capture(self.step)

    def step(self) -> None:
        """One token for each sequence."""
        tokens, positions, settings = self.numbers[0], self.numbers[1], self.numbers[2:]
        self.logits = self._forward(tokens, positions, self._cache)
        self.finite.logical_and_(torch.isfinite(self.logits).all())
        drawn = draw(self.logits, settings, self.others, self.seen, self._sampled)
        self.drawn.index_copy_(0, self.row, drawn[None])
        self.row.add_(1).remainder_(BURST)
        tokens.copy_(drawn)
        positions.add_(1).clamp_(max=self._cache.length - 1)  # a sequence that is over may go on until the host looks


class _CudaCapture:
    """Captures with torch.cuda.graph; all graphs share one pool of memory, since they never run side by side."""

    def __init__(self, device: torch.device):
        self._device, self._pool = device, None

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries take their workspaces, Triton compiles: not while capturing
                step()
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on using the device, for instance another model's
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        return graph.replay


def decode_mode() -> str:
    """How steps are computed on CUDA, by $DOLLY_DECODE: a way round a kernel that fails on some card.

    Raises:
        SettingError: it has another value than those of DECODE_MODES.
    """
    mode = os.environ.get("DOLLY_DECODE") or DECODE_MODES[0]
    if mode not in DECODE_MODES:
        raise SettingError(unknown_name("DOLLY_DECODE", mode, DECODE_MODES))
    return mode


def batch_size(sequences: int) -> int:
    """Rows of the graph for so many sequences: a power of two up to 8, then a multiple of 8."""
    return 1 << (sequences - 1).bit_length() if sequences <= 8 else -(-sequences // 8) * 8


def burst(seconds: float, remaining: list[int]) -> int:
    """Steps to run before the host looks, if one takes `seconds` and the sequences have so many tokens to go."""
    return max(1, min(BURST, int(BURST_SECONDS / max(seconds, 1e-9)), max(remaining)))
