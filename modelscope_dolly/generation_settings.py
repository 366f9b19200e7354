"""The keywords of a call: their defaults, what is allowed, and what they mean to the engine."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from modelscope_dolly.engine.settings import MAX_NEW_TOKENS, Sampling
from modelscope_dolly.errors import SettingError, is_whole, shown, unknown_name

#: torch's generator tells this many seeds apart.
SEEDS = 2**32
#: Whole numbers that the engine and a GPU count with.
_MOST = 2**31 - 1
#: Answers to one input.
_MOST_SEQUENCES = 1 << 16
#: Repetition penalties that leave every logit a finite float32, whatever the network.
_PENALTIES = (1e-6, 1e6)
#: presence_penalty and frequency_penalty, and the values of logit_bias: OpenAI's ranges.
_COUNT_PENALTY, _BIAS = 2.0, 100.0
#: Likeliest tokens given with each token; OpenAI's limit.
MOST_LOGPROBS = 20
OVERFLOW_MODES = ("error", "truncate_context")


@dataclass(frozen=True)
class GenerationSettings:
    """Keywords of a call, named as `transformers` generate names them; the defaults are those of the public pipeline.

    Attributes:
        max_new_tokens: at most so many tokens; cut, with a warning, to what the window leaves.
        do_sample, temperature, top_k, top_p, repetition_penalty: see engine/settings.Sampling.
        num_return_sequences: answers per input; their seeds are seed, seed + 1, ...
        seed: of each answer's own generator; None takes one from torch's global generator (torch.manual_seed).
        stop: text or texts that end an answer and are not part of it.
        return_full_text: put the instruction and a newline before the answer.
        on_overflow: "error", or "truncate_context" to shorten a context that leaves no room for max_new_tokens (or for
            half of the window, if that is less).
        prompt_lookup: True for speculative decoding with draft tokens from the prompt, which answers often copy from;
            "auto" does so with float32 weights, where it does not show in the answer.
        logprobs, min_p, presence_penalty, frequency_penalty, logit_bias, min_new_tokens: see engine/settings.Sampling.
        bad_words: texts that the answer must not hold, each as it is and with a space before it, as they are tokenised
            on their own.
        choices: the answer is the likeliest of these texts.
        regex: the answer matches this regular expression as a whole, unless it is cut at max_new_tokens.
        json_schema: the answer is JSON that this schema allows, under the same condition; {} allows any JSON.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    do_sample: bool = Sampling.do_sample
    temperature: float = Sampling.temperature
    top_k: int = Sampling.top_k
    top_p: float = Sampling.top_p
    repetition_penalty: float = Sampling.repetition_penalty
    num_return_sequences: int = 1
    seed: int | None = None
    stop: str | Sequence[str] = ()
    return_full_text: bool = False
    on_overflow: str = "error"
    prompt_lookup: bool | str = "auto"
    logprobs: int | None = Sampling.logprobs
    min_p: float = Sampling.min_p
    presence_penalty: float = Sampling.presence_penalty
    frequency_penalty: float = Sampling.frequency_penalty
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    min_new_tokens: int = Sampling.min_new_tokens
    choices: Sequence[str] = ()
    regex: str | None = None
    json_schema: Mapping[str, Any] | None = None

    def updated(self, keywords: Mapping[str, Any]) -> GenerationSettings:
        """These settings with `keywords` on top, all checked.

        Raises:
            SettingError: unknown keyword (the nearest known one is named), or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in keywords:
            if name not in known:
                raise SettingError(unknown_name("keyword", name, known))
        changed = dataclasses.replace(self, **keywords)
        problems = [message for holds, message in changed._requirements() if not holds]
        if problems:
            raise SettingError("; ".join(problems))
        return dataclasses.replace(changed, **changed._in_own_types())

    def samplings(self, bad_words: tuple[tuple[int, ...], ...] = ()) -> list[Sampling]:
        """One for each returned sequence, with its seed. Each input of a list starts from the same seed as if alone.

        Args:
            bad_words: the token ids of those texts.
        """
        first = self.seed if self.seed is not None else int(torch.randint(0, SEEDS, ()))
        same = {own.name: getattr(self, own.name) for own in dataclasses.fields(Sampling)}
        return [
            Sampling(**{**same, "bad_words": bad_words, "seed": (first + i) % SEEDS})
            for i in range(self.num_return_sequences)
        ]

    def _in_own_types(self) -> dict[str, Any]:
        """Python's own numbers and tuples: NumPy's numbers are of fixed size, and overflow in arithmetic with seeds."""
        whole = ("max_new_tokens", "top_k", "num_return_sequences", "min_new_tokens")
        real = ("temperature", "top_p", "repetition_penalty", "min_p", "presence_penalty", "frequency_penalty")
        optional = ("seed", "logprobs")
        return {
            **{name: int(getattr(self, name) or 0) for name in whole},
            **{name: float(getattr(self, name)) for name in real},
            **{name: int(getattr(self, name)) for name in optional if getattr(self, name) is not None},
            **{name: tuple(_texts(getattr(self, name))) for name in ("stop", "bad_words", "choices")},
            "logit_bias": {int(id): float(bias) for id, bias in (self.logit_bias or {}).items()},
        }

    def _requirements(self) -> Iterator[tuple[bool, str]]:
        def real(value: Any, low: float, high: float = sys.float_info.max) -> bool:
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            return number and low <= value <= high

        def must(holds: bool, name: str, allowed: str) -> tuple[bool, str]:
            return holds, f"{name} is {shown(getattr(self, name))}, it must be {allowed}"

        above_0 = math.ulp(0.0)
        low, high = _PENALTIES
        yield must(is_whole(self.max_new_tokens, 1, _MOST), "max_new_tokens", "a whole number of at least 1")
        yield must(isinstance(self.do_sample, bool), "do_sample", "True or False")
        yield must(
            real(self.temperature, above_0),
            "temperature",
            "a number above 0 (for the likeliest answer pass do_sample=False)",
        )
        top_k = self.top_k is None or is_whole(self.top_k, 0, _MOST)
        yield must(top_k, "top_k", "a whole number of at least 0 (0: all tokens)")
        yield must(real(self.top_p, above_0, 1), "top_p", "a number in (0, 1]")
        penalty = f"above 0, from {low:g} to {high:g}"
        yield must(real(self.repetition_penalty, low, high), "repetition_penalty", penalty)
        several = is_whole(self.num_return_sequences, 1, _MOST_SEQUENCES)
        yield must(several, "num_return_sequences", f"a whole number of at least 1, at most {_MOST_SEQUENCES}")
        if several and self.num_return_sequences != 1:
            yield must(self.do_sample is True, "do_sample", "True for several sequences: greedy ones are all the same")
        seed = self.seed is None or is_whole(self.seed, 0, SEEDS - 1)
        yield must(seed, "seed", f"None or a whole number, 0 to {SEEDS - 1}")
        yield must(_texts(self.stop) is not None, "stop", "a text or a list of texts, none empty")
        yield must(isinstance(self.return_full_text, bool), "return_full_text", "True or False")
        mode = isinstance(self.on_overflow, str) and self.on_overflow in OVERFLOW_MODES
        yield must(mode, "on_overflow", f"one of {', '.join(OVERFLOW_MODES)}")
        lookup = self.prompt_lookup
        lookup = isinstance(lookup, bool) or (isinstance(lookup, str) and lookup == "auto")
        yield must(lookup, "prompt_lookup", "True, False or 'auto'")
        logprobs = self.logprobs is None or is_whole(self.logprobs, 0, MOST_LOGPROBS)
        yield must(logprobs, "logprobs", f"None or a whole number, 0 to {MOST_LOGPROBS}")
        yield must(real(self.min_p, 0, 1), "min_p", "a number in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            in_range = real(getattr(self, name), -_COUNT_PENALTY, _COUNT_PENALTY)
            yield must(in_range, name, f"a number, {-_COUNT_PENALTY:g} to {_COUNT_PENALTY:g}")
        biases = isinstance(self.logit_bias, Mapping) and all(
            is_whole(id, 0, _MOST) and real(bias, -_BIAS, _BIAS) for id, bias in self.logit_bias.items()
        )
        allowed = f"a dict of token ids and numbers, {-_BIAS:g} to {_BIAS:g}"
        yield must(self.logit_bias is None or biases, "logit_bias", allowed)
        words = _texts(self.bad_words)
        words = words is not None and all(_is_unicode(word) for word in words)
        yield must(words, "bad_words", "a text or a list of texts, none empty")
        least = is_whole(self.min_new_tokens, 0, _MOST)
        yield must(least, "min_new_tokens", "a whole number of at least 0")
        if least and is_whole(self.max_new_tokens, 1, _MOST):
            fits = self.min_new_tokens <= self.max_new_tokens
            yield must(fits, "min_new_tokens", f"at most max_new_tokens, which is {self.max_new_tokens}")
        yield from self._forms(must)

    def _forms(self, must: Callable[[bool, str, str], tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
        choices = _texts(self.choices)
        several = choices is not None and len(set(choices)) == len(choices) and all(map(_is_unicode, choices))
        yield must(several, "choices", "a list of texts, none empty and none twice")
        regex = self.regex is None or (isinstance(self.regex, str) and self.regex and _is_unicode(self.regex))
        yield must(bool(regex), "regex", "None or a regular expression that is not empty")
        schema = self.json_schema is None or isinstance(self.json_schema, dict)
        yield must(schema, "json_schema", "None or a JSON schema as a dict")
        given = {"choices": bool(choices), "regex": self.regex is not None, "json_schema": self.json_schema is not None}
        forms = [name for name, is_given in given.items() if is_given]
        if len(forms) > 1:
            yield must(False, forms[1], f"left out beside {forms[0]}: an answer has one form")
        if forms:
            # Each of them could end the answer before it is complete, or leave no token that may come next.
            for name in ("stop", "bad_words", "min_new_tokens"):
                value = getattr(self, name)
                yield must(
                    isinstance(value, (str, list, tuple, int)) and not value, name, f"left out beside {forms[0]}"
                )
        if choices:
            alone = self.num_return_sequences
            yield must(not is_whole(alone, 2, _MOST), "num_return_sequences", "1 beside choices: one of them is chosen")


def _texts(value: Any) -> list[str] | tuple[str, ...] | None:
    """One text or several, none empty, as a list; None for anything else."""
    texts = [value] if isinstance(value, str) else () if value is None else value
    good = isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts)
    return texts if good else None


def _is_unicode(text: str) -> bool:
    """Whether it has a UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
