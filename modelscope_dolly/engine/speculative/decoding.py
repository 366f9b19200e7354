"""The guesses of one run: which of them each decode step verifies, and what is learnt from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile
from operator import mul
from typing import Protocol

from modelscope_dolly.engine.gpt_neox import NeoX
from modelscope_dolly.engine.sampling import Sampler
from modelscope_dolly.engine.speculative.draft_model import Drafted, DraftRun
from modelscope_dolly.engine.speculative.prompt_lookup import MOST, Guesser, PassCost, plan


class Answering(Protocol):
    """A request in work, as far as guessing is concerned."""

    ids: list[int]
    sampler: Sampler
    guesser: Guesser | None
    drafted: Drafted

    @property
    def room(self) -> int: ...


class Counts(Protocol):
    """The counters of engine.RunStats that are kept here."""

    guessed: int
    accepted: int
    draft_passes: int


class Guessing:
    """Decides, before each decode step of a run, what is guessed for each answer in work.

    Args:
        net: verifies the guesses.
        cost: of its passes.
        stats: counts guesses, accepted ones and passes of the draft.
    """

    def __init__(self, net: NeoX, cost: PassCost, stats: Counts):
        self._cost, self._stats, self._config = cost, stats, net.config
        self._idle = 0  # steps since a guess was verified
        self._from_draft: set[int] = set()  # places whose guesses of this step were drafted
        self.draft: DraftRun | None = None

    def guess(self, active: Sequence[Answering]) -> list[list[int]]:
        """Ids that may follow in each slot, as many as are worth verifying: often none."""
        found = [self._ready(one) for one in active]
        counts, speed = plan([chances for _, chances in found], self._cost, self._idle)
        guesses = [ids[:count] for (ids, _), count in zip(found, counts, strict=True)]
        self._from_draft.clear()
        if self.draft is not None:
            guesses = self._with_drafts(active, found, guesses, speed)
        self._idle = 0 if any(guesses) else self._idle + 1
        self._stats.guessed += sum(map(len, guesses))
        return guesses

    def learn(self, place: int, one: Answering, before: int, guessed: Sequence[int]) -> None:
        """The answer at `place` had `before` ids, and `guessed` was verified; what was drawn is in it now."""
        if not guessed:
            return
        made = one.ids[before:]
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(guessed, made, strict=False)))
        self._stats.accepted += right
        if place in self._from_draft:
            one.drafted.learn(before, len(guessed), right)

    def move(self, source: int, target: int) -> None:
        """An answer has changed its slot."""
        if self.draft is not None:
            self.draft.cache.move(source, target)

    def _ready(self, one: Answering) -> tuple[list[int], list[float]]:
        """What the answer's guesser says, without ids that the network does not have."""
        most = min(MOST, one.room - 1)
        if one.guesser is None or most < 1:
            return [], []
        ids, chances = one.guesser.guess(most)
        ids = list(takewhile(lambda token: 0 <= token < self._config.vocab_size, ids[:most]))
        return ids, chances[: len(ids)]

    def _with_drafts(
        self, active: Sequence[Answering], found: Sequence[tuple], guesses: list[list[int]], speed: float
    ) -> list[list[int]]:
        """Drafted tokens instead of `guesses`, which promise `speed`, where that promises more."""
        assert self.draft is not None
        offers = [chances for _, chances in found]
        drafted = []
        for place, one in enumerate(active):
            chances = one.drafted.offer(min(MOST, one.room - 1))
            if _expected(chances) > _expected(offers[place]):
                offers[place] = chances
                drafted.append(place)
        if not drafted:
            return guesses
        draft_cost = self.draft.cost(len(drafted), self._cost, self._config)
        counts, promised = plan(offers, self._cost, self._idle, drafted, draft_cost)
        if promised <= speed:
            counts = [0 if place in drafted else len(ids) for place, ids in enumerate(guesses)]
        else:
            guesses = [ids[:count] for (ids, _), count in zip(found, counts, strict=True)]
        for place in drafted:
            if not counts[place]:
                active[place].drafted.refused()
        places = [place for place in drafted if counts[place]]
        if places:
            wanted = [(place, one.ids, one.sampler, one.drafted, counts[place])
                      for place, one in enumerate(active) if place in places]  # fmt: skip
            for place, ids in zip(places, self.draft.guess(wanted), strict=True):
                guesses[place] = ids
                self._from_draft.add(place)
            self._stats.draft_passes = self.draft.passes
        return guesses


def _expected(chances: Sequence[float]) -> float:
    """How many guesses will be accepted, given the chance of each if those before it are right."""
    return sum(accumulate(chances, mul))
