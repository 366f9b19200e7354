"""Decode steps of one network on one CUDA device, recorded as CUDA graphs and replayed.

At batch 1 a step of a small model takes about a millisecond, and launching its hundreds of kernels from Python takes
several. So a step is recorded once for each batch size and replayed with a single launch.

How it works
1. A step reads its input from tensors at fixed places (`_Board`), draws the next tokens on the device (sampling.draw)
   and writes them where the next step reads them. Nothing in it waits for the host or depends on the host's numbers.
2. So several steps run before the host looks at what was drawn. What was made behind the end of an answer is thrown
   away; its keys and values lie in a slot that is free by then.
3. Two forwards can be recorded: the fused one, made of the kernels in triton_kernels.py, six for each layer; and the
   network's own, looking at the whole cache under a mask.
4. Before a recording is used, its logits are compared with those of the ordinary pass on the same input. One that
   fails, or differs by more than rounding, is given up with a warning; without any, the engine computes step by step.
5. Recordings hold the addresses of a key/value cache. It is kept from run to run while it is large enough.

Recording and replaying follow torch's manual ("CUDA graphs", torch.cuda.graph). Tests run all of this but the graph
itself on the CPU; it has not run on a GPU yet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from modelscope_dolly.engine.gpt_neox import KVCache, NeoX, Step
from modelscope_dolly.engine.sampling import Sampler, draw
from modelscope_dolly.errors import HardwareError, SettingError, one_line, unknown_name
from modelscope_dolly.hardware import dtype_name
from modelscope_dolly.kernels import triton_decode as triton_kernels

log = logging.getLogger("modelscope.dolly")

#: The host looks at the drawn tokens at least this often: steps, and seconds.
BURST, BURST_SECONDS = 16, 0.03
#: Cache lengths are rounded up to this, so that runs of about the same length share recordings.
CACHE_STEP = 256
#: Distance between the logits of a recording and of the ordinary pass, as a share of their spread. bfloat16 rounds to
#: 0.4 %, and errors add up over the layers; a wrong kernel is off by more than all of the spread.
_NEAR = {torch.float32: 1e-3}
_NEAR_IN_HALF = 0.1

#: Values of $DOLLY_DECODE: the fused kernels if they can be used, recordings of torch's own kernels, no recordings.
WAYS = ("fused", "recorded", "plain")

#: (tokens [B], positions [B], cache) -> logits [B, V].
Forward = Callable[[torch.Tensor, torch.Tensor, KVCache], torch.Tensor]
#: Runs a step a few times, records it, and returns what replays it.
Record = Callable[[Callable[[], None]], Callable[[], None]]


class Answering(Protocol):
    """A request in work, as far as a decode step is concerned."""

    ids: list[int]
    sampler: Sampler


class Decoder:
    """Recorded decode steps of a network.

    Args:
        net: all of it on `device`.
        device: of the network.
        record: makes a recording; another one than for CUDA is for tests.
    """

    def __init__(self, net: NeoX, device: torch.device, record: Record | None = None):
        self.net, self.device = net, device
        self.record = record or _CudaRecorder(device)
        self.forwards: list[tuple[str, Forward]] = [("torch's kernels", self._plain)]  # the one in use is the first
        if way() == "fused" and can_fuse(net) and triton_kernels.usable(device):
            self.forwards.insert(0, ("the fused kernels", self._fused))
        self._kept: Recordings | None = None

    @contextmanager
    def recordings(self, slots: int, length: int) -> Iterator[Recordings]:
        """Steps over a cache of at least that size, for one run; the cache of the last run if it is large enough."""
        found, self._kept = self._kept, None  # a run at the same time makes its own
        if found is None or found.cache.slots < slots or found.cache.length < length:
            del found  # its memory may be what the new one needs
            found = Recordings(self, KVCache(slots, length))
        try:
            yield found
        except HardwareError:
            raise  # numbers that are not finite may be in its cache
        except BaseException:
            self._kept = found
            raise
        self._kept = found

    def _plain(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.net(tokens, Step(positions, length=cache.length, padded=True), cache)

    def _fused(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if len(tokens) > triton_kernels.LARGEST_M:
            return self._plain(tokens, positions, cache)
        return fused_forward(self.net, tokens, positions, cache)


class Recordings:
    """The recorded steps over one cache, by batch size and by what sampling needs."""

    def __init__(self, decoder: Decoder, cache: KVCache):
        self.cache = cache
        self._decoder = decoder
        self._boards: dict[tuple[int, bool, bool], _Board] = {}
        self._checked: set[int] = set()  # batch sizes

    def prepare(self, active: Sequence[Answering]) -> _Board | None:
        """What runs steps for these answers, active[i] in slot i: recorded and checked if it is new (seconds).

        None: nothing can be recorded here. Call it, and what it returns, with gradients off and the device to itself.
        """
        sampled = any(one.sampler.sampling.do_sample for one in active)
        penalised = any(one.sampler.seen is not None for one in active)
        size = min(batch_size(len(active)), self.cache.slots)
        key = (size, sampled, penalised)
        while key not in self._boards and self._decoder.forwards:
            name, forward = self._decoder.forwards[0]
            try:
                board = _Board(self._decoder, self.cache, forward, *key)
                board.record(active)
                if size not in self._checked:
                    self._check(board, active)
                    self._checked.add(size)
                self._boards[key] = board
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler that is missing, an old driver, a kernel that the card lacks
                reason = f"{type(error).__name__}: {one_line(error)}"
                log.warning("%s cannot be used on %s (%s)", name, self._decoder.device, reason)
                del self._decoder.forwards[0]
                self._boards.clear()
                self._checked.clear()
        return self._boards.get(key)

    def _check(self, board: _Board, active: Sequence[Answering]) -> None:
        """Compare a recorded step with the ordinary pass. Raises ArithmeticError."""
        net, device = self._decoder.net, self._decoder.device
        positions = [len(one.ids) - 1 for one in active]
        tokens = torch.tensor([one.ids[-1] for one in active], device=device)
        expected = net(tokens, Step(torch.tensor(positions), length=max(positions) + 1), self.cache).float()
        board.fill(active)
        board.replay()
        assert board.logits is not None
        found = board.logits[: len(active)].float()
        spread = (expected - expected.mean(dim=-1, keepdim=True)).norm()
        far = float((found - expected).norm() / spread.clamp(min=1e-30))
        if not far <= _NEAR.get(board.logits.dtype, _NEAR_IN_HALF):  # also NaN
            raise ArithmeticError(f"its logits are {far:.2g} of their spread away from the ordinary pass")


class _Board:
    """What a recorded step reads and writes, at fixed places on the device; B answers.

    Attributes:
        numbers: int64 [6, B]: token, position, then the first part of Sampler.settings.
        others: float32 [3, B]: the second part.
        seen: bool [B, V], see sampling.draw.
        made: int64 [BURST, B], the drawn ids; row `row` is written next.
        sound: whether all logits were finite.
        logits: of the last step, [B, V].
    """

    def __init__(self, decoder: Decoder, cache: KVCache, forward: Forward, size: int, sampled: bool, penalised: bool):
        self._decoder, self._cache, self._forward, self._sampled = decoder, cache, forward, sampled
        device = decoder.device
        self.numbers = torch.zeros(6, size, dtype=torch.int64, device=device)
        self.others = torch.ones(3, size, device=device)
        vocabulary = decoder.net.config.vocab_size
        self.seen = torch.zeros(size, vocabulary, dtype=torch.bool, device=device) if penalised else None
        self.made = torch.zeros(BURST, size, dtype=torch.int64, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.sound = torch.ones((), dtype=torch.bool, device=device)
        self.logits: torch.Tensor | None = None
        self.replay: Callable[[], None] = self.step

    def run(self, active: Sequence[Answering], steps: int) -> list[list[int]]:
        """The next `steps` ids of each answer.

        Raises:
            HardwareError: the network's output is not finite.
        """
        assert 1 <= steps <= BURST, steps
        self.fill(active)
        for _ in range(steps):
            self.replay()
        made, sound = self.made[:steps].cpu(), bool(self.sound)  # the host waits here
        if not sound:
            assert self.logits is not None
            raise HardwareError(not_finite(self.logits.dtype, self._decoder.device))
        return made.T.tolist()[: len(active)]

    def fill(self, active: Sequence[Answering]) -> None:
        """Copy the state of the answers to the device; rows without an answer work for nobody, in free slots."""
        settings = [one.sampler.settings() for one in active]
        rows = [(one.ids[-1], len(one.ids) - 1, *whole) for one, (whole, _) in zip(active, settings, strict=True)]
        self.numbers[:, : len(active)].copy_(torch.tensor(rows).T)
        self.numbers[:, len(active) :].zero_()
        self.others[:, : len(active)].copy_(torch.tensor([others for _, others in settings]).T)
        self.row.zero_()
        self.sound.fill_(True)
        if self.seen is not None:
            self.seen.zero_()
            places = [(row, token) for row, one in enumerate(active) for token in one.sampler.seen or ()]
            if places:
                rows, tokens = torch.tensor(places, device=self.seen.device).T
                self.seen[rows, tokens] = True

    def record(self, active: Sequence[Answering]) -> None:
        """Make `replay` a recording. It begins from the answers' state: their slots are written."""
        self.fill(active)
        self.replay = self._decoder.record(self.step)

    def step(self) -> None:
        """One token for each answer."""
        tokens, positions, settings = self.numbers[0], self.numbers[1], self.numbers[2:]
        self.logits = self._forward(tokens, positions, self._cache)
        self.sound.logical_and_(torch.isfinite(self.logits).all())
        drawn = draw(self.logits, settings, self.others, self.seen, self._sampled)
        self.made.index_copy_(0, self.row, drawn[None])
        self.row.add_(1).remainder_(BURST)
        tokens.copy_(drawn)
        positions.add_(1).clamp_(max=self._cache.length - 1)  # an answer that is over may go on until the host looks


class _CudaRecorder:
    """Records with torch.cuda.graph; all recordings share one pool of memory, since they never run side by side."""

    def __init__(self, device: torch.device):
        self._device, self._pool = device, None

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries take their workspaces, Triton compiles: not while recording
                step()
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on using the device, for instance another model's
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        return graph.replay


def way() -> str:
    """How steps are computed on CUDA, by $DOLLY_DECODE: a way round a kernel that fails on some card.

    Raises:
        SettingError: it has another value than those of WAYS.
    """
    found = os.environ.get("DOLLY_DECODE") or WAYS[0]
    if found not in WAYS:
        raise SettingError(unknown_name("DOLLY_DECODE", found, WAYS))
    return found


def batch_size(answers: int) -> int:
    """Rows of the recording for so many answers: a power of two up to 8, then a multiple of 8."""
    return 1 << (answers - 1).bit_length() if answers <= 8 else -(-answers // 8) * 8


def burst(seconds: float, rooms: Sequence[int]) -> int:
    """Steps to run before the host looks, if one takes `seconds` and the answers may have `rooms` more tokens."""
    return max(1, min(BURST, int(BURST_SECONDS / max(seconds, 1e-9)), max(rooms)))


def not_finite(dtype: torch.dtype, device: torch.device) -> str:
    """The message for logits that are infinite or no numbers."""
    return (
        f"the network's output is not finite in {dtype_name(dtype)} on {device}: the weights are damaged "
        "(dolly check) or overflow in this type; use dtype='bf16' or 'fp32'"
    )


def can_fuse(net: NeoX) -> bool:
    """Whether `fused_forward` computes this network: dolly-v2 and pythia, not every GPT-NeoX."""
    return net.config.use_parallel_residual and net.config.hidden_act == "gelu"


def fused_forward(net: NeoX, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """NeoX.forward for one token [B] in each of the slots 0 to B - 1, in fewer kernels.

    Both layer norms in one; GELU and the two additions of the residual stream behind the linear layers before them;
    rotary embedding, writing to the cache and attention in one, which reads no further than each position.
    """
    x = net.gpt_neox.embed_in(tokens)
    cos, sin = (table.flatten(1) for table in net.gpt_neox.layers[0].attention.rotary(positions, x.dtype))
    for layer in net.gpt_neox.layers:
        attention, mlp = layer.attention, layer.mlp
        first, second = triton_kernels.two_norms(x, layer.input_layernorm, layer.post_attention_layernorm)
        mixed = _linear(attention.query_key_value, first).view(len(x), attention.heads, 3, -1)
        keys, values = cache.layer(attention.index, mixed[:, :, 1])
        attended = triton_kernels.attend(mixed, cos, sin, keys, values, positions)
        hidden = _linear(mlp.dense_h_to_4h, second, gelu=True)
        x = _linear(attention.dense, attended, residual=x)
        x = _linear(mlp.dense_4h_to_h, hidden, residual=x)
    return _linear(net.embed_out, net.gpt_neox.final_layer_norm(x))


def _linear(module: nn.Module, x: torch.Tensor, gelu: bool = False, residual: torch.Tensor | None = None):
    scales = getattr(module, "scales", None)  # of a quantised layer
    return triton_kernels.linear(x, module.weight, scales, module.bias, gelu=gelu, residual=residual)
