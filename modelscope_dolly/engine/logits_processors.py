"""What changes the logits of one answer before a token is drawn from them: biases, penalties, and tokens ruled out.

Names, meanings and order are those of transformers' logits processors (generation/logits_process.py, in the order of
`GenerationMixin._get_logits_processor`); those of presence_penalty, frequency_penalty and logit_bias are OpenAI's
(platform.openai.com/docs, "Frequency and presence penalties"; vLLM has the same).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from modelscope_dolly.engine.constraints import Constraint
from modelscope_dolly.engine.settings import Sampling


class LogitsProcessors:
    """Those that a request asks for, and what they know of its sequence.

    Args:
        sampling: their settings.
        prompt: ids of the prompt.
        stop_ids: that min_new_tokens rules out.
        constraint: the form of the answer, or None.

    Attributes:
        seen: ids whose logits the repetition penalty changes; None without a penalty.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        stop_ids: frozenset[int] = frozenset(),
        constraint: Constraint | None = None,
    ):
        self._sampling, self._constraint = sampling, constraint
        self.seen = set(prompt) if sampling.repetition_penalty != 1.0 else None
        self._bias = _columns(sampling.logit_bias) if sampling.logit_bias else None
        counts = sampling.presence_penalty or sampling.frequency_penalty
        self._counts: Counter[int] | None = Counter() if counts else None
        self._never = torch.tensor(
            sorted({word[0] for word in sampling.bad_words if len(word) == 1}), dtype=torch.int64
        )
        self._phrases = [word for word in sampling.bad_words if len(word) > 1]
        longest = max(map(len, self._phrases), default=1)
        self._recent = list(prompt)[-(longest - 1) :] if self._phrases else []
        self._stop = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        self._until_stop = sampling.min_new_tokens if stop_ids else 0

    @staticmethod
    def needed(sampling: Sampling) -> bool:
        """Whether a request with these settings has any."""
        return sampling.repetition_penalty != 1.0 or LogitsProcessors.beyond_repetition(sampling)

    @staticmethod
    def beyond_repetition(sampling: Sampling) -> bool:
        """Whether it has one that a captured step does not know; see sampling.draw."""
        penalties = sampling.presence_penalty or sampling.frequency_penalty
        return bool(penalties or sampling.logit_bias or sampling.bad_words or sampling.min_new_tokens)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 logits [V] -> new ones; -inf for tokens that are ruled out. Raises SettingError: see Constraint."""
        logits = logits.clone()
        if self._bias is not None:
            logits.index_add_(0, *(column.to(logits.device) for column in self._bias))
        if self.seen:
            _penalize(logits, self.seen, self._sampling.repetition_penalty)
        if self._counts:
            ids, counts = (column.to(logits.device) for column in _columns(self._counts))
            logits.index_add_(0, ids, -counts * self._sampling.frequency_penalty - self._sampling.presence_penalty)
        if ruled_out := self._ruled_out():
            logits.index_fill_(0, torch.cat(ruled_out).to(logits.device), -torch.inf)
        if self._constraint is not None:
            logits.masked_fill_(~self._constraint.allowed().to(logits.device), -torch.inf)
        return logits

    def advance(self, token: int) -> None:
        """`token` is the next one of the sequence."""
        if self.seen is not None:
            self.seen.add(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._phrases:
            self._recent = [*self._recent, token][-(max(map(len, self._phrases)) - 1) :]
        self._until_stop = max(0, self._until_stop - 1)
        if self._constraint is not None:
            self._constraint.advance(token)

    def copy(self) -> LogitsProcessors:
        """Another one in the same state."""
        twin = LogitsProcessors.__new__(LogitsProcessors)
        twin.__dict__ = dict(self.__dict__)  # what is not copied below is never changed in place
        twin.seen = set(self.seen) if self.seen is not None else None
        twin._counts = Counter(self._counts) if self._counts is not None else None
        twin._constraint = self._constraint.copy() if self._constraint is not None else None
        return twin

    def _ruled_out(self) -> list[torch.Tensor]:
        """Ids that must not come next."""
        ids = [self._never] if len(self._never) else []
        last = [word[-1] for word in self._phrases if tuple(self._recent[1 - len(word) :]) == word[:-1]]
        if last:
            ids.append(torch.tensor(last))
        if self._until_stop:
            ids.append(self._stop)
        return ids


def penalize(logits: torch.Tensor, seen: set[int], penalty: float) -> torch.Tensor:
    """Push down the tokens in `seen`; returns a new tensor [V]."""
    return _penalize(logits.clone(), seen, penalty)


def _penalize(logits: torch.Tensor, seen: set[int], penalty: float) -> torch.Tensor:
    ids = torch.tensor(sorted(seen), device=logits.device)
    values = logits[ids]
    return logits.index_copy_(0, ids, torch.where(values < 0, values * penalty, values / penalty))


def _columns(values: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids and their float32 values."""
    return torch.tensor(list(values)), torch.tensor(list(values.values()), dtype=torch.float32)
