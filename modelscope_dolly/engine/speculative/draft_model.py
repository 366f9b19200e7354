"""A smaller network of the family drafts tokens for the larger one to verify (Leviathan et al. 2023, arXiv:2211.17192).

Where tokens are sampled, the draft draws with the same dice as the network it drafts for (`Sampler.copy`): two
networks that agree about the probabilities then draw the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from modelscope_dolly.engine.gpt_neox import KVCache, NeoX, Step
from modelscope_dolly.engine.sampling import Sampler
from modelscope_dolly.engine.speculative.prompt_lookup import PassCost, Rate

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

#: An answer whose drafts did not pay gets another one after so many passes, then after twice as many, and so on.
_WAIT = 32
#: How often a drafted token is right, until it is measured.
_PRIOR = 0.7


@dataclass
class Draft:
    """A network that drafts, and what its passes cost; its vocabulary is that of the network it drafts for."""

    net: NeoX
    cost: PassCost = field(default_factory=PassCost)


@dataclass
class Drafted:
    """What a run knows of the drafts of one answer.

    Attributes:
        cached: tokens of the answer whose keys and values are in the draft's cache.
        rate: how often a drafted token was right.
        wait: passes until the next trial; wait_next: and until the one after it.
    """

    cached: int = 0
    rate: Rate = field(default_factory=lambda: Rate(_PRIOR))
    wait: int = 0
    wait_next: int = _WAIT

    def offer(self, most: int) -> list[float]:
        """Chances of `most` tokens that could be drafted now; none while it waits. Call it once a pass."""
        if self.wait:
            self.wait -= 1
            if self.wait:
                return []
            self.rate = Rate(_PRIOR)  # another chance
        return [self.rate.value] * most

    def refused(self) -> None:
        """Drafting did not promise to pay. If that is because its tokens were wrong, it waits."""
        if self.rate.value < _PRIOR:
            self.wait, self.wait_next = self.wait_next, 2 * self.wait_next

    def learn(self, before: int, guessed: int, right: int) -> None:
        """Of `guessed` tokens drafted behind the first `before`, the first `right` were right."""
        for place in range(min(right + 1, guessed)):
            self.rate.add(place < right)
        if right == guessed:
            self.wait_next = _WAIT
        self.cached = before + min(right, guessed - 1)  # the last one was never fed


@dataclass
class DraftRun:
    """The drafts of one run: its own cache, with the same slots as the run's.

    Attributes:
        draft: the network.
        forward: (ids, step, cache, draft) -> logits, a pass of it.
        cache: its keys and values.
        prefill_tokens: a pass over new prompts holds at most this many tokens, or one prompt.
    """

    draft: Draft
    forward: Callable[[list[int], Step, KVCache, Draft], torch.Tensor]
    cache: KVCache
    prefill_tokens: int
    passes: int = 0

    def cost(self, answers: int, of_target: PassCost, target: GPTNeoXConfig) -> float:
        """Seconds of a pass that drafts one token of each of `answers`; by the networks' sizes until it is measured."""
        if self.draft.cost.largest:
            return self.draft.cost(answers)
        return of_target(answers) * _weights(self.draft.net.config) / _weights(target)

    def guess(self, wanted: Sequence[tuple[int, Sequence[int], Sampler, Drafted, int]]) -> list[list[int]]:
        """Draft tokens for several answers together.

        Args:
            wanted: (slot, ids of prompt and answer, the answer's sampler, its state, tokens to draft) of each, by
                slot.
        """
        guesses: list[list[int]] = [[] for _ in wanted]
        dice = [sampler.copy() for _, _, sampler, _, _ in wanted]
        logits = self._catch_up(wanted)
        going = list(range(len(wanted)))
        while True:
            for place, row in zip(going, logits, strict=True):
                guesses[place].append(dice[place].next(row))
            going = [place for place in going if len(guesses[place]) < wanted[place][4]]
            if not going:
                return guesses
            blocks = [(wanted[place][0], len(wanted[place][1]) + len(guesses[place]) - 1, 1) for place in going]
            logits = self._pass([guesses[place][-1] for place in going], Step.extend(blocks))

    def _catch_up(self, wanted: Sequence[tuple]) -> list[torch.Tensor]:
        """Feed what each answer has more than the cache -> the logits of its newest token."""
        logits: dict[int, torch.Tensor] = {}
        batches: list[list[int]] = []
        room = 0
        for place, (_, ids, _, state, _) in enumerate(wanted):
            new = len(ids) - state.cached
            if not batches or new > room:
                batches.append([])
                room = self.prefill_tokens
            batches[-1].append(place)
            room -= new
        for batch in batches:
            fresh = [place for place in batch if not wanted[place][3].cached]
            grown = [place for place in batch if wanted[place][3].cached]
            for places, feed in ((fresh, self._prefill), (grown, self._extend)):
                if places:
                    logits.update(zip(places, feed([wanted[place] for place in places]), strict=True))
        return [logits[place] for place in range(len(wanted))]

    def _prefill(self, wanted: Sequence[tuple]) -> torch.Tensor:
        tokens: list[int] = []
        spans = []
        for slot, ids, _, state, _ in wanted:
            spans.append((slot, len(tokens), len(tokens) + len(ids)))
            tokens.extend(ids)
            state.cached = len(ids)
        positions = torch.cat([torch.arange(end - begin) for _, begin, end in spans])
        return self._pass(tokens, Step(positions, spans=tuple(spans)))

    def _extend(self, wanted: Sequence[tuple]) -> torch.Tensor:
        tokens: list[int] = []
        blocks = []
        for slot, ids, _, state, _ in wanted:
            blocks.append((slot, state.cached, len(ids) - state.cached))
            tokens.extend(ids[state.cached :])
            state.cached = len(ids)
        return self._pass(tokens, Step.extend(blocks, last_only=True))

    def _pass(self, ids: list[int], step: Step) -> torch.Tensor:
        self.passes += 1
        return self.forward(ids, step, self.cache, self.draft)


def _weights(config: GPTNeoXConfig) -> int:
    """About so many numbers are read in a pass."""
    layer = config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
