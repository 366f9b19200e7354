"""Log-probabilities of tokens under the network itself: before any penalty, filter, or temperature."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLogprob(NamedTuple):
    """How likely a token was.

    Attributes:
        id: of the token.
        logprob: natural logarithm of its probability, of the network's softmax over the whole vocabulary.
        top: (id, logprob) of the likeliest tokens in its place, likeliest first, ties by smaller id.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: torch.Tensor, id: int, top: int = 0) -> TokenLogprob:
    """Of token `id`, and of the `top` likeliest ones.

    Row by row and in float64, so that it depends neither on the rows beside it nor, but for the sixteenth digit, on the
    number of threads that sum up the vocabulary.

    Args:
        logits: [V] of any number type, as the network gave them.
    """
    values = logits.double()
    total = values.logsumexp(0)
    ids = likeliest(values, top)[:top] if top else values.new_empty(0, dtype=torch.int64)
    chosen, *others = (values[torch.cat((ids.new_tensor([id]), ids))] - total).tolist()
    return TokenLogprob(id, chosen, tuple(zip(ids.tolist(), others, strict=True)))


def likeliest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest values and of those equal to the last of them, largest first, ties by smaller id.

    Ids that are ruled out (-inf) are left out where there are not as many others.
    """
    if count < len(values):
        floor = values.topk(count).values[-1]
        ids = (values >= floor if floor > -torch.inf else values > floor).nonzero()[:, 0]
    else:
        ids = torch.arange(len(values), device=values.device)
    return ids[values[ids].sort(descending=True, stable=True).indices]
