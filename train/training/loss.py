"""The loss of a forward pass: cross entropy of its response tokens, divided by those of the whole global batch.

Divided like this, the gradient of a step is the same whatever the number of ranks, of accumulation steps, and of
records per pass. Logits are computed only where there is a label: on databricks-dolly-15k that is 41 % of the tokens,
and the 50,280-wide logits of the others never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GPTNeoXForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from train.data.collate import IGNORED


def response_loss(network: GPTNeoXForCausalLM, inputs: dict[str, Any], labels: torch.Tensor, label_total: int):
    """Scalar loss of one forward pass; the losses of all passes of a step add up to the mean over the global batch.

    Args:
        network: with attention `dolly_packed` for a packed batch.
        inputs: of the forward pass, from packed_batch.
        labels: [rows, N], IGNORED where nothing is learned.
        label_total: response tokens of the global batch.
    """
    hidden = network.gpt_neox(**inputs).last_hidden_state
    learned = labels != IGNORED
    # With no label at all the sum is 0, and still a function of the weights, so that every rank joins the exchange.
    return summed_cross_entropy(network.lm_head(hidden[learned]), labels[learned]) / label_total


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over labels [N] of logits [N, V], in float32 at least."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


class CausalLMLoss(torch.nn.Module):
    """A network whose forward pass gives the loss of a planned pass, so that DeepSpeed sees one call per pass.

    Around the network, not a subclass of it: transformers renames `embed_out` on disk to `lm_head` in memory by the
    name of the class, and leaves the head of any other class at random values with no more than a warning.
    """

    def __init__(self, network: GPTNeoXForCausalLM, loss: Callable[..., torch.Tensor] = response_loss):
        super().__init__()
        self.network, self.config, self.loss = network, network.config, loss

    def forward(
        self,
        labels: torch.Tensor | None = None,
        label_total: int = 1,
        places: torch.Tensor | None = None,
        **inputs: Any,
    ) -> CausalLMOutput:
        """The loss, see response_loss; with `places` [rows] instead of labels the logits [rows, V] behind these tokens
        of a packed pass.
        """
        if places is not None:
            hidden = self.network.gpt_neox(**inputs).last_hidden_state
            return CausalLMOutput(logits=self.network.lm_head(hidden[0, places]))
        return CausalLMOutput(loss=self.loss(self.network, inputs, labels, label_total))
