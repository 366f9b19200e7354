"""From what a user gives (a question, a record, keywords) to answers: settings, inputs, the window, and the text.

Everything goes through `TextGenerator.stream`; a list, one answer and a stream differ only in who reads its updates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sequence import Proposer, Request, TokenLogprob
from modelscope_dolly.errors import PromptError, shown, unknown_name
from modelscope_dolly.generation_settings import GenerationSettings
from modelscope_dolly.prompt import DollyTokenizer, check_instruction, check_text, reduce_conversation
from modelscope_dolly.text_stream import TextStream

log = logging.getLogger("modelscope.dolly")

#: Slots used for a list when the caller gives no batch_size.
DEFAULT_SLOTS = 8
_QUESTION_KEYS = ("instruction", "text", "messages")
_INPUT_KEYS = {*_QUESTION_KEYS, "context"}
_RECORD_KEYS = {"response", "category"}  # of databricks-dolly-15k; a record can be asked as it is


@dataclass(frozen=True)
class Prompt:
    """One checked input."""

    instruction: str
    context: str | None = None


def parse_input(value: Any, ignore_unknown: bool = False, context: str | None = None) -> Prompt:
    """A text, a mapping with `instruction` (or `text`) and perhaps `context`, or one with `messages`, as a Prompt.

    Args:
        value: what the user gave.
        ignore_unknown: let other keys pass, as for the rows of a data set.
        context: given beside the value.

    Raises:
        PromptError: another type, an unknown key, an empty instruction, text that is not Unicode, a conversation that
            cannot be reduced, or two contexts.
    """
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping):
        raise PromptError(
            f"an input must be a text or a dict with 'instruction' and perhaps 'context', found {type(value).__name__}"
        )
    for key in value:
        if not ignore_unknown and not (isinstance(key, str) and key in _INPUT_KEYS | _RECORD_KEYS):
            raise PromptError(unknown_name("input key", key, _INPUT_KEYS))
    given = [key for key in _QUESTION_KEYS if key in value]
    if len(given) != 1:
        found = ", ".join(key if isinstance(key, str) else shown(key) for key in value)
        raise PromptError(
            f"an input needs either 'instruction' or 'text', found keys: {found or 'none'}; a conversation is a dict "
            "with 'messages'"
        )
    if given == ["messages"]:
        instruction, own = reduce_conversation(value["messages"])
    else:
        instruction, own = check_instruction(value[given[0]]), None
    contexts = [check_text("context", text) for text in (own, value.get("context"), context) if text is not None]
    if len([text for text in contexts if text]) > 1:
        raise PromptError("there are two contexts: give it once, with the instruction, as keyword or as system message")
    return Prompt(instruction, max(contexts, default=None, key=len))  # the one that is not empty


@dataclass(frozen=True)
class Update:
    """News of one answer.

    Attributes:
        index: of the answer.
        text: of the answer so far.
        finish_reason: why it ended (`stop`, `length`); None while it goes on.
        new_tokens: of the answer so far, without the one that ends it.
        prompt_tokens: of its prompt.
        logprobs: of each of the new tokens, where the settings ask for them.
    """

    index: int
    text: str
    finish_reason: str | None
    new_tokens: int
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


class TextGenerator:
    """Answers prompts with an engine and a tokenizer. Holds no state of a call: safe to use from several threads.

    Args:
        engine: of the network.
        tokenizer: of the network.
        prompt_lookup: makes a proposer of draft tokens from a prompt, where settings ask for it.
        lookup_by_default: what the setting "auto" means here.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: DollyTokenizer,
        prompt_lookup: Callable[[Sequence[int]], Proposer] | None = None,
        lookup_by_default: bool = False,
    ):
        self.engine, self.tokenizer = engine, tokenizer
        self._prompt_lookup, self._lookup_by_default = prompt_lookup, lookup_by_default

    def stream(self, prompts: Sequence[Prompt], settings: GenerationSettings, slots: int) -> Iterator[Update]:
        """Yield an Update whenever the text of an answer grew and when it ended.

        Answer `i` of prompt `p` has index `p * num_return_sequences + i`.

        Raises:
            PromptError: an input leaves no room for an answer, see fit.
            HardwareError: see Engine.run.
        """
        requests, streams = self._requests(prompts, settings)
        texts = [""] * len(requests)
        counts = [0] * len(requests)
        logprobs: list[list[TokenLogprob]] = [[] for _ in requests]
        for token in self.engine.run(requests, slots):
            index, stream = token.index, streams[token.index]
            if token.id not in requests[index].stop_ids:
                counts[index] += 1
                logprobs[index] += [token.logprob] if token.logprob else []
            if token.finish_reason:
                stream.finish()
            text = stream.text if token.finish_reason else stream.texts.popleft()
            if token.finish_reason or text != texts[index]:
                texts[index] = text
                prompt = prompts[index // settings.num_return_sequences]
                head = f"{prompt.instruction}\n" if settings.return_full_text else ""
                used = len(requests[index].ids)
                given = tuple(logprobs[index]) if settings.logprobs is not None else None
                yield Update(index, head + text, token.finish_reason, counts[index], used, given)

    def _requests(
        self, prompts: Sequence[Prompt], settings: GenerationSettings
    ) -> tuple[list[Request], list[TextStream]]:
        """One for each answer, and where its text comes together."""
        requests: list[Request] = []
        streams: list[TextStream] = []
        lookup = settings.prompt_lookup if settings.prompt_lookup != "auto" else self._lookup_by_default
        proposer = self._prompt_lookup if lookup else None
        bad_words = self._bad_words(settings)
        for prompt in prompts:
            ids, room = self.fit(prompt, settings)
            for sampling in settings.samplings(bad_words):
                stream = TextStream(self.tokenizer, tuple(settings.stop))
                streams.append(stream)
                requests.append(Request(ids, room, sampling, self.tokenizer.control.stop, stream.push, proposer))
        return requests, streams

    def _bad_words(self, settings: GenerationSettings) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word, at the beginning of a text and behind a space."""
        spaced = [f" {word}" for word in settings.bad_words if not word[0].isspace()]
        return tuple(tuple(self.tokenizer.encode_text(word)) for word in (*settings.bad_words, *spaced))

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings, slots: int) -> list[list[Update]]:
        """The last update of each answer, grouped by prompt."""
        last = {update.index: update for update in self.stream(prompts, settings, slots)}
        count = settings.num_return_sequences
        return [[last[prompt * count + i] for i in range(count)] for prompt in range(len(prompts))]

    def details(self, update: Update) -> dict[str, Any]:
        """What an output holds beside the text, as JSON has it: "logprobs", where they were asked for."""
        return {} if update.logprobs is None else {"logprobs": [self.logprob_dict(one) for one in update.logprobs]}

    def logprob_dict(self, logprob: TokenLogprob) -> dict[str, Any]:
        """{"id", "token", "logprob", "top": [the same of the likeliest]}; "token" is text, see prompt.token_text."""

        def named(id: int, value: float) -> dict[str, Any]:
            return {"id": id, "token": self.tokenizer.token_text(id), "logprob": value}

        return {**named(logprob.id, logprob.logprob), "top": [named(*pair) for pair in logprob.top]}

    def fit(self, prompt: Prompt, settings: GenerationSettings) -> tuple[list[int], int]:
        """Prompt ids, and how many new tokens the window leaves for them (at most max_new_tokens).

        Raises:
            PromptError: not even one; the message has the counts.
        """
        window, wanted = self.engine.window, settings.max_new_tokens
        ids = self.tokenizer.encode(prompt.instruction, prompt.context)
        # A context gives way until the answer has what it wants, but not more than half of the window for it.
        limit = window - min(wanted, window // 2)
        if settings.on_overflow == "truncate_context" and prompt.context and len(ids) > limit:
            ids = self._with_shorter_context(prompt, limit)
        room = window - len(ids)
        if room < 1:
            whole = prompt.context and settings.on_overflow == "error"  # else all of a context has been cut already
            remedy = 'context, or pass on_overflow="truncate_context"' if whole else "instruction"
            raise PromptError(
                f"the prompt has {len(ids)} tokens and the window {window}, which leaves no room for an answer; "
                f"shorten the {remedy}"
            )
        if room < wanted:
            log.warning(
                "max_new_tokens cut from %d to %d: the prompt has %d tokens, the window %d",
                wanted, room, len(ids), window,
            )  # fmt: skip
        return ids, min(wanted, room)

    def _with_shorter_context(self, prompt: Prompt, limit: int) -> list[int]:
        """Ids of the prompt with as much of its context's beginning as keeps it within `limit` tokens.

        Bisection: a few characters more may fit where they complete a word that is one token. Without any context the
        prompt may still be longer than `limit`: the instruction is never cut.
        """
        assert prompt.context is not None
        low, high = 0, len(prompt.context)  # low fits (or is 0), high does not
        best = self.tokenizer.encode(prompt.instruction, None)
        while high - low > 1:
            middle = (low + high) // 2
            ids = self.tokenizer.encode(prompt.instruction, prompt.context[:middle])
            if len(ids) <= limit:
                low, best = middle, ids
            else:
                high = middle
        log.warning("context cut from %d to %d characters to leave room for the answer", len(prompt.context), low)
        return best
