"""From logits to the next token: the filters of transformers' generate, in its order, one generator per request."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. Names and meanings are those of transformers' GenerationConfig.

    The defaults are those of the public dolly pipeline (training/generate.py).

    Attributes:
        do_sample: False takes the likeliest token (greedy); then only repetition_penalty has an effect.
        temperature: logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this (Holtzman et al. 2020).
        repetition_penalty: logits of tokens seen before, prompt included, are divided (positive) or multiplied
            (negative) by it (Keskar et al. 2019).
        seed: of this answer's own random generator.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.92
    repetition_penalty: float = 1.0
    seed: int = 0


class Sampler:
    """Draws the tokens of one answer; its generator makes them independent of the other answers in a batch.

    The generator lives on the CPU whatever the device, so that a seed gives the same answer everywhere as far as the
    logits are the same.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]):
        self.sampling = sampling
        self._seen = set(prompt) if sampling.repetition_penalty != 1.0 else None
        self._generator = torch.Generator("cpu").manual_seed(sampling.seed) if sampling.do_sample else None

    def next(self, logits: torch.Tensor) -> int:
        """Logits [V] of any number type -> token id."""
        logits = logits.float()
        if self._seen is not None:
            logits = penalize(logits, self._seen, self.sampling.repetition_penalty)
        token = self._draw(logits) if self._generator is not None else int(logits.argmax())
        if self._seen is not None:
            self._seen.add(token)
        return token

    def _draw(self, logits: torch.Tensor) -> int:
        ids, probabilities = distribution(logits, self.sampling)
        # Inverse of the cumulative distribution at one uniform number: one number a token, whatever the filters keep.
        cumulative = probabilities.double().cumsum(0)
        point = torch.rand((), dtype=torch.float64, generator=self._generator).item() * cumulative[-1].item()
        place = int(torch.searchsorted(cumulative, point, right=True))
        return int(ids[min(place, len(ids) - 1)])


def penalize(logits: torch.Tensor, seen: set[int], penalty: float) -> torch.Tensor:
    """Push down the tokens in `seen`; returns a new tensor [V]."""
    ids = torch.tensor(sorted(seen), device=logits.device)
    values = logits[ids]
    return logits.index_copy(0, ids, torch.where(values < 0, values * penalty, values / penalty))


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [K] that may be drawn and their unnormalised probabilities [K], likeliest first, ties by smaller id."""
    values, ids = logits.sort(descending=True, stable=True)
    # Distances to the likeliest token: dividing the logits themselves by a tiny temperature would overflow.
    values = (values - values[0]) / max(sampling.temperature, torch.finfo(values.dtype).tiny)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    probabilities = values.softmax(0)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(0) - probabilities  # mass of everything likelier than this token
        kept = max(1, int((before < sampling.top_p).sum()))
        ids, probabilities = ids[:kept], probabilities[:kept]
    return ids, probabilities
