"""From logits to the next token: the filters of transformers' generate, in its order, one generator per request."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch

from modelscope_dolly.engine.constraints import Constraint
from modelscope_dolly.engine.logits_processors import LogitsProcessors
from modelscope_dolly.engine.logprobs import TokenLogprob, likeliest, token_logprob
from modelscope_dolly.engine.settings import Sampling


class Sampler:
    """Draws the tokens of one answer, independently of the other answers in a batch.

    A draw is an exponential race (the Gumbel-max trick; Maddison et al. 2014, arXiv:1411.0030): each token's noise is a
    hash of (seed, number of the draw, token id), and the token with the largest probability / noise is drawn. Noise
    that belongs to the token id makes the draw robust: logits that differ by rounding (another batch size, device or
    number type), or by being a smaller network's, mostly give the same token.

    Args:
        sampling: the settings.
        prompt: ids of the prompt.
        stop_ids: ids that end the answer.
        constraint: the form of the answer, or None.

    Attributes:
        logprob: of the token drawn last, by the logits as they were given; None where the settings do not ask for it.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        stop_ids: frozenset[int] = frozenset(),
        constraint: Constraint | None = None,
    ):
        self.sampling = sampling
        self.draws = 0  # draws made so far
        self.logprob: TokenLogprob | None = None
        self._constrained = constraint is not None
        needed = self._constrained or LogitsProcessors.needed(sampling)
        self._processors = LogitsProcessors(sampling, prompt, stop_ids, constraint) if needed else None
        self._seed = _mix(sampling.seed)

    def sample(self, logits: torch.Tensor) -> int:
        """Logits [V] of any number type -> the next token id. Raises SettingError: see Constraint."""
        values = logits.float()
        if self._processors is not None:
            values = self._processors.apply(values)
        token = self._draw(values) if self.sampling.do_sample else int(values.argmax())
        if self.sampling.logprobs is not None:
            self.logprob = token_logprob(logits, token, self.sampling.logprobs)
        self.advance(token)
        return token

    def take(self, logits: torch.Tensor, token: int) -> None:
        """`token` is the next one, whatever would have been drawn from logits [V]."""
        self.logprob = token_logprob(logits, token, self.sampling.logprobs or 0)
        self.advance(token)

    def advance(self, token: int) -> None:
        """`token` is the next one; `draw` has drawn it with this sampler's settings."""
        self.draws += 1
        if self._processors is not None:
            self._processors.advance(token)

    @property
    def capturable(self) -> bool:
        """Whether `draw` draws as this sampler does."""
        sampling = self.sampling
        beyond = self._constrained or sampling.min_p or LogitsProcessors.beyond_repetition(sampling)
        return sampling.logprobs is None and not beyond

    def settings(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Whole numbers (key, draws, top_k, do_sample) and others (temperature, top_p, penalty) for `draw`."""
        sampling = self.sampling
        return (
            (_signed(self._seed), self.draws, sampling.top_k, int(sampling.do_sample)),
            (sampling.temperature, sampling.top_p, sampling.repetition_penalty),
        )

    @property
    def seen(self) -> set[int] | None:
        """Ids whose logits the repetition penalty changes; None without a penalty."""
        return self._processors.seen if self._processors is not None else None

    def copy(self) -> Sampler:
        """A sampler with the same random numbers: from equal logits it draws what this one will draw.

        It gives no log-probabilities.
        """
        twin = copy.copy(self)
        if self.sampling.logprobs is not None:
            twin.sampling, twin.logprob = dataclasses.replace(self.sampling, logprobs=None), None
        twin._processors = self._processors.copy() if self._processors is not None else None
        return twin

    def _draw(self, logits: torch.Tensor) -> int:
        ids, probabilities = distribution(logits, self.sampling)
        if len(ids) == 1:
            return int(ids)
        # float64: a float32 uniform number is 0 once in 2^24 draws, and an unlikely token would win
        race = probabilities.double() / noise(_mix(self._seed + self.draws), ids)
        return int(ids[race.argmax()])


def draw(
    logits: torch.Tensor, whole: torch.Tensor, others: torch.Tensor, seen: torch.Tensor | None, sampled: bool
) -> torch.Tensor:
    """The next tokens [B] of B sequences, as their samplers would draw them, without the host waiting for anything.

    It works on any device and can be captured in a CUDA graph: all shapes are fixed, so where `Sampler.sample` looks at
    a few of the likeliest tokens first, this sorts the vocabulary.

    Args:
        logits: [B, V], any number type.
        whole: int64 [4, B], others: float32 [3, B], the samplers' `settings`; draws are counted up in place.
        seen: bool [B, V], tokens that the repetition penalty changes, the drawn one is added; None without a penalty.
        sampled: whether any sequence has do_sample.
    """
    key, draws, top_k, do_sample = whole
    temperature, top_p, penalty = others
    logits = logits.float()
    if seen is not None:
        pushed = torch.where(logits < 0, logits * penalty[:, None], logits / penalty[:, None])
        logits = torch.where(seen, pushed, logits)
    tokens = logits.argmax(dim=-1)
    if sampled:
        keys = _scrambled(key + draws + _signed(_GOLDEN))
        tokens = torch.where(do_sample > 0, _race(logits, temperature, top_k, top_p, keys), tokens)
    draws += 1
    if seen is not None:
        seen.scatter_(1, tokens[:, None], True)
    return tokens


def _race(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """`distribution` and the exponential race for each row of logits [B, V]; the rest are [B] -> ids [B]."""
    smallest = torch.finfo(logits.dtype).tiny
    values = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.clamp(min=smallest)[:, None]
    values, ids = values.sort(dim=-1, descending=True, stable=True)  # stable: ties by smaller id
    place = torch.arange(values.shape[-1], device=values.device)
    top_k = torch.where(top_k > 0, top_k, values.shape[-1])[:, None]
    weights = torch.where(place < top_k, values.exp(), 0.0)
    probabilities = weights / weights.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = (before < top_p[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
    kept = torch.where(top_p[:, None] < 1.0, kept, values.shape[-1])
    race = probabilities.double() / noise(keys[:, None], ids)
    race = torch.where((place < kept) & (place < top_k), race, -1.0)
    return ids.gather(1, race.argmax(dim=-1, keepdim=True))[:, 0]


def noise(key: int | torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Exponential random numbers [..., K], float64, one for each id: the same for a (key, id) on every device.

    Output number `id` of the SplitMix64 generator (Steele, Lea, Flood 2014) that starts at `key`, as a uniform number.
    """
    key = _signed(key) if isinstance(key, int) else key
    bits = _scrambled(ids * _signed(_GOLDEN) + key)  # integers wrap around
    return -torch.log((_shifted(bits, 11).double() + 0.5) * 2.0**-53)


def _scrambled(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function of int64 numbers; `_mix` is the same for Python's integers."""
    for shift, factor in ((30, _FACTORS[0]), (27, _FACTORS[1])):
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor)
    return bits ^ _shifted(bits, 31)


_GOLDEN, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ALL = 2**64 - 1


def _mix(number: int) -> int:
    """One step of SplitMix64 on a Python integer."""
    bits = (number + _GOLDEN) & _ALL
    for shift, factor in ((30, _FACTORS[0]), (27, _FACTORS[1])):
        bits = (bits ^ bits >> shift) * factor & _ALL
    return bits ^ bits >> 31


def _signed(bits: int) -> int:
    """64 bits as torch's int64 holds them."""
    return bits - 2**64 if bits >> 63 else bits


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right, filling with zeros; torch's own shift repeats the sign."""
    return bits >> by & (1 << 64 - by) - 1


#: So many of the likeliest tokens are looked at first: sorting the whole vocabulary takes longer than all of the rest.
_FIRST = (256, 4096)


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [K] that may be drawn and their unnormalised probabilities [K], likeliest first, ties by smaller id.

    With neither top_k nor top_p all ids are kept, in their own order.
    """
    ids, probabilities = _top(logits, sampling)
    if not sampling.min_p:
        return ids, probabilities
    kept = probabilities >= sampling.min_p * probabilities.max()
    return ids[kept], probabilities[kept]


def _top(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """`distribution` without min_p."""
    # Distances to the likeliest token: dividing the logits themselves by a tiny temperature would overflow.
    values = (logits - logits.max()) / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if not sampling.top_k and sampling.top_p >= 1.0:
        return torch.arange(len(values), device=values.device), values.softmax(0)
    total = values.exp().sum() if not sampling.top_k else None
    for count in (*_FIRST, len(values)):
        ids = likeliest(values, max(count, sampling.top_k))
        probabilities = values[ids].exp()
        if sampling.top_k:
            ids, probabilities = ids[: sampling.top_k], probabilities[: sampling.top_k]
        probabilities = probabilities / (total if total is not None else probabilities.sum())
        if sampling.top_p >= 1.0:
            return ids, probabilities
        before = probabilities.cumsum(0) - probabilities  # mass of everything likelier than this token
        kept = max(1, int((before < sampling.top_p).sum()))
        if sampling.top_k or kept < len(ids) or len(ids) < count or count >= len(values):
            return ids[:kept], probabilities[:kept]
    raise AssertionError("the last round looks at all tokens")
