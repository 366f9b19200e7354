"""Draft tokens from a smaller network of the family (Leviathan et al. 2023, arXiv:2211.17192).

Where tokens are sampled, the draft draws with the same random numbers as the network it drafts for (`Sampler.copy`):
two networks that agree about the probabilities then draw the same token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.runner import Runner
from modelscope_dolly.engine.sequence import Sequence
from modelscope_dolly.engine.speculative.policy import AcceptanceRate
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.engine.step_timer import StepTimer
from modelscope_dolly.errors import SettingError

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig

#: A sequence whose drafts did not pay gets another one after so many steps, then after twice as many, and so on.
_FIRST_WAIT = 32
#: Acceptance rate of draft tokens, until it is measured.
_PRIOR = 0.7


@dataclass
class DraftModel:
    """A draft network, and what its steps take; its vocabulary is that of the network it drafts for."""

    net: GPTNeoX
    timer: StepTimer = field(default_factory=StepTimer)


@dataclass
class DraftState:
    """What is known of the drafts of one sequence.

    Attributes:
        cached: tokens of the sequence whose keys and values are in the draft's cache.
        rate: of accepted draft tokens.
        wait: steps until the next trial; next_wait: and until the one after it.
    """

    cached: int = 0
    rate: AcceptanceRate = field(default_factory=lambda: AcceptanceRate(_PRIOR))
    wait: int = 0
    next_wait: int = _FIRST_WAIT

    def offer(self, limit: int) -> list[float]:
        """Acceptance probabilities of `limit` tokens that could be drafted now; none while it waits. Once a step."""
        if self.wait:
            self.wait -= 1
            if self.wait:
                return []
            self.rate = AcceptanceRate(_PRIOR)
        return [self.rate.value] * limit

    def decline(self) -> None:
        """Drafting did not promise to pay. If that is because its tokens were rejected, it waits."""
        if self.rate.value < _PRIOR:
            self.wait, self.next_wait = self.next_wait, 2 * self.next_wait

    def observe(self, before: int, proposed: int, accepted: int) -> None:
        """Of `proposed` tokens drafted behind the first `before`, the first `accepted` were kept."""
        for place in range(min(accepted + 1, proposed)):
            self.rate.add(place < accepted)
        if accepted == proposed:
            self.next_wait = _FIRST_WAIT
        self.cached = before + min(accepted, proposed - 1)  # the last one was never fed


@dataclass
class DraftJob:
    """Tokens to draft for one sequence."""

    slot: int
    sequence: Sequence
    state: DraftState
    count: int


class DraftRun:
    """The drafts of an engine: their own cache, with the same slots as the engine's.

    Args:
        draft: the network.
        runner: of the engine.
        prefill_tokens: a step over new prompts holds at most this many tokens, or one prompt.
    """

    def __init__(self, draft: DraftModel, runner: Runner, prefill_tokens: int):
        self.draft, self._runner, self._prefill_tokens = draft, runner, prefill_tokens
        self.cache = draft.net.new_cache()
        runner.add_cache(self.cache, draft.net.cache_bytes)

    def seconds(self, sequences: int) -> float:
        """Of a step that drafts one token for each of `sequences`; by the networks' sizes until it is measured."""
        if self.draft.timer.largest:
            return self.draft.timer.seconds(sequences)
        share = _weights(self.draft.net.config) / _weights(self._runner.net.config)
        return self._runner.timer.seconds(sequences) * share

    def propose(self, jobs: list[DraftJob]) -> list[list[int]]:
        """Draft tokens for several sequences together, in the order of their slots."""
        size = self._runner.cache.slots, self._runner.cache.length
        self.cache.resize(*size, used=min(size[0], self.cache.slots))
        drafts: list[list[int]] = [[] for _ in jobs]
        samplers = [job.sequence.sampler.copy() for job in jobs]
        logits = self._catch_up(jobs)
        active = list(range(len(jobs)))
        while True:
            going_on = []
            for place, row in zip(active, logits, strict=True):
                try:
                    drafts[place].append(samplers[place].sample(row))
                except SettingError:  # of a form that is too complex to follow: the sequence's own draw says so
                    continue
                if len(drafts[place]) < jobs[place].count:
                    going_on.append(place)
            active = going_on
            if not active:
                return drafts
            spans = [(jobs[place].slot, len(jobs[place].sequence.ids) + len(drafts[place]) - 1, 1) for place in active]
            logits = self._forward([drafts[place][-1] for place in active], StepInput.verify(spans))

    def _catch_up(self, jobs: list[DraftJob]) -> list[torch.Tensor]:
        """Feed what each sequence has more than the cache -> the logits [V] of its newest token."""
        batches: list[list[DraftJob]] = []
        room = 0
        for job in jobs:
            new = len(job.sequence.ids) - job.state.cached
            if not batches or new > room:
                batches.append([])
                room = self._prefill_tokens
            batches[-1].append(job)
            room -= new
        return [row for batch in batches for row in self._extend(batch)]

    def _extend(self, jobs: list[DraftJob]) -> torch.Tensor:
        tokens: list[int] = []
        spans = []
        for job in jobs:
            spans.append((job.slot, job.state.cached, len(job.sequence.ids) - job.state.cached))
            tokens.extend(job.sequence.ids[job.state.cached :])
            job.state.cached = len(job.sequence.ids)
        return self._forward(tokens, StepInput.verify(spans, last_only=True))

    def _forward(self, tokens: list[int], step: StepInput) -> torch.Tensor:
        return self._runner.forward(self.draft.net, tokens, step, self.cache, self.draft.timer)


def _weights(config: NetworkConfig) -> int:
    """About so many numbers are read in a step."""
    layer = config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
