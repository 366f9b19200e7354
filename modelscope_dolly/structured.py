"""Answers that keep to a form, a regular expression or a JSON schema: llguidance as the engine's Constraint.

A byte-level parser says which tokens may come next; all others are ruled out before the draw. A control token is never
part of a form; those that end an answer are allowed where it is complete. So what comes out matches, unless it was cut
at its length. Limits on the size of a grammar, and on the work for one token, are llguidance's (LLParserLimits).
It is in the extra `structured`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from modelscope_dolly.engine.constraints import Constraint
from modelscope_dolly.errors import SettingError, one_line
from modelscope_dolly.prompt import DollyTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

#: White space in JSON, as json.dumps writes it. With any amount allowed, a small model may never come to an end of it.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Forms:
    """Makes constraints for the answers of one model. Safe to use from several threads.

    Args:
        tokenizer: of the model.
        vocabulary: logits that the network has; those without a token are never allowed.
    """

    def __init__(self, tokenizer: DollyTokenizer, vocabulary: int):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()
        self._compiled: LLTokenizer | None = None  # the trie of all tokens: a second for 50,000

    def __call__(self, regex: str | None = None, json_schema: Mapping | None = None) -> Callable[[], Constraint]:
        """What makes a constraint for each answer; one of the two is given.

        Raises:
            SettingError: llguidance is not installed, cannot read the form or does not support it, or no text fits it.
        """
        llguidance = _llguidance()
        name = "regex" if json_schema is None else "json_schema"
        if json_schema is None:
            grammar = llguidance.LLMatcher.grammar_from_regex(regex)
        else:
            try:
                text = json.dumps(json_schema, allow_nan=False)
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
            except (TypeError, ValueError, RecursionError) as error:
                raise SettingError(f"json_schema: not JSON ({one_line(error)})") from None
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokens(llguidance), grammar, log_level=0, limits=limits)
        _check(name, matcher)
        LLGuidanceConstraint(name, matcher).copy().allowed()  # that nothing fits shows here first
        return lambda: LLGuidanceConstraint(name, matcher.deep_copy())

    def _tokens(self, llguidance: Any) -> LLTokenizer:
        with self._lock:
            if self._compiled is None:
                wrapper = llguidance.TokenizerWrapper(_Tokens(self._tokenizer, self._vocabulary))
                ends = sorted(self._tokenizer.control.stop)
                self._compiled = llguidance.LLTokenizer(wrapper, n_vocab=self._vocabulary, eos_token=ends)
        return self._compiled


class LLGuidanceConstraint:
    """The form of one answer. See engine/constraints.py.

    Args:
        name: of the setting, for messages.
        matcher: of the form, at the beginning of the answer.
    """

    def __init__(self, name: str, matcher: LLMatcher):
        self._name, self._matcher = name, matcher

    def allowed(self) -> torch.Tensor:
        # Not ahead of time in another thread: it takes less than that thread would, see docs/performance.md.
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        _check(self._name, self._matcher)
        return mask > 0

    def advance(self, token: int) -> None:
        if not self._matcher.is_stopped():  # behind the end there may be draft tokens
            self._matcher.consume_token(token)

    def copy(self) -> LLGuidanceConstraint:
        return LLGuidanceConstraint(self._name, self._matcher.deep_copy())


class _Tokens:
    """A tokenizer as llguidance wants one."""

    bos_token_id = None

    def __init__(self, tokenizer: DollyTokenizer, vocabulary: int):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.control.end
        self.tokens = [tokenizer.token_bytes(id) for id in range(vocabulary)]
        self.special_token_ids = [id for id, content in enumerate(self.tokens) if not content]
        for id in self.special_token_ids:  # a name each, or llguidance would take them for one
            self.tokens[id] = b"<%d>" % id

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode_text(text.decode("utf-8") if isinstance(text, bytes) else text)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise SettingError(
            f"regex and json_schema need llguidance ({one_line(error)}): pip install 'modelscope-dolly[structured]'"
        ) from None
    return llguidance


def _check(name: str, matcher: LLMatcher) -> None:
    """Raises SettingError with the matcher's error, if it has one."""
    if not matcher.is_error():
        return
    message = matcher.get_error()
    if "NoExtension" in message:
        raise SettingError(f"{name}: no text fits it")
    reasons = [line.strip() for line in message.splitlines() if line.strip().startswith("error:")]
    raise SettingError(f"{name}: {one_line(reasons[0] if reasons else message)}")
