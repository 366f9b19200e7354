"""From what a user gives (a question, a record, keywords) to answers: settings, inputs, the window, and the text.

Everything goes through `TextGenerator.stream`; a list, one answer and a stream differ only in who reads its updates.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sequence import Proposer, Request, Token
from modelscope_dolly.engine.settings import MAX_NEW_TOKENS, Sampling
from modelscope_dolly.errors import PromptError, SettingError, is_whole, shown, unknown_name
from modelscope_dolly.prompt import DollyTokenizer, check_instruction, check_text, reduce_conversation
from modelscope_dolly.text_stream import TextStream

log = logging.getLogger("modelscope.dolly")

#: Slots used for a list when the caller gives no batch_size.
DEFAULT_SLOTS = 8
#: torch's generator tells this many seeds apart.
SEEDS = 2**32
#: Whole numbers that the engine and a GPU count with.
_MOST = 2**31 - 1
#: Answers to one input.
_MOST_SEQUENCES = 1 << 16
#: Repetition penalties that leave every logit a finite float32, whatever the network.
_PENALTIES = (1e-6, 1e6)
OVERFLOW_MODES = ("error", "truncate_context")
_QUESTION_KEYS = ("instruction", "text", "messages")
INPUT_KEYS = {*_QUESTION_KEYS, "context"}
#: Of databricks-dolly-15k; a record can be asked as it is.
RECORD_KEYS = {"response", "category"}


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
        stop = (changed.stop,) if isinstance(changed.stop, str) else tuple(changed.stop or ())
        # Python's own numbers from here on: NumPy's are of fixed size, and overflow in arithmetic with seeds.
        whole = {name: int(getattr(changed, name) or 0) for name in ("max_new_tokens", "top_k", "num_return_sequences")}
        real = {name: float(getattr(changed, name)) for name in ("temperature", "top_p", "repetition_penalty")}
        seed = int(changed.seed) if changed.seed is not None else None
        return dataclasses.replace(changed, stop=stop, seed=seed, **whole, **real)

    def samplings(self) -> list[Sampling]:
        """One for each returned sequence, with its seed. Each input of a list starts from the same seed as if alone."""
        first = self.seed if self.seed is not None else int(torch.randint(0, SEEDS, ()))
        return [
            Sampling(
                self.do_sample,
                self.temperature,
                self.top_k,
                self.top_p,
                self.repetition_penalty,
                (first + i) % SEEDS,
            )
            for i in range(self.num_return_sequences)
        ]

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
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        texts = isinstance(stop, (list, tuple)) and all(isinstance(text, str) and text for text in stop)
        yield must(stop is None or texts, "stop", "a text or a list of texts, none empty")
        yield must(isinstance(self.return_full_text, bool), "return_full_text", "True or False")
        mode = isinstance(self.on_overflow, str) and self.on_overflow in OVERFLOW_MODES
        yield must(mode, "on_overflow", f"one of {', '.join(OVERFLOW_MODES)}")
        lookup = self.prompt_lookup
        lookup = isinstance(lookup, bool) or (isinstance(lookup, str) and lookup == "auto")
        yield must(lookup, "prompt_lookup", "True, False or 'auto'")


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
        if not ignore_unknown and not (isinstance(key, str) and key in INPUT_KEYS | RECORD_KEYS):
            raise PromptError(unknown_name("input key", key, INPUT_KEYS))
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
    """News of one answer: its text so far, and why it ended (`stop`, `length`), None while it goes on."""

    index: int
    text: str
    finish_reason: str | None
    new_tokens: int
    prompt_tokens: int


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
        asked = self.requests(prompts, settings)
        for token in self.engine.run(asked.requests, slots):
            if update := asked.update(token):
                yield update

    def requests(self, prompts: Sequence[Prompt | list[int]], settings: GenerationSettings) -> TextRequests:
        """What the engine is asked for these prompts, for a caller who submits it himself.

        Args:
            prompts: a list of token ids is continued as it is, and white space around the text is kept.
            settings: of all answers.

        Raises:
            PromptError: as stream.
        """
        lookup = settings.prompt_lookup if settings.prompt_lookup != "auto" else self._lookup_by_default
        return TextRequests(self, prompts, settings, self._prompt_lookup if lookup else None)

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings, slots: int) -> list[list[Update]]:
        """The last update of each answer, grouped by prompt."""
        last = {update.index: update for update in self.stream(prompts, settings, slots)}
        count = settings.num_return_sequences
        return [[last[prompt * count + i] for i in range(count)] for prompt in range(len(prompts))]

    def fit(self, prompt: Prompt | list[int], settings: GenerationSettings) -> tuple[list[int], int]:
        """Prompt ids, and how many new tokens the window leaves for them (at most max_new_tokens).

        Raises:
            PromptError: not even one; the message has the counts.
        """
        window, wanted = self.engine.window, settings.max_new_tokens
        raw = not isinstance(prompt, Prompt)
        ids = list(prompt) if raw else self.tokenizer.encode(prompt.instruction, prompt.context)
        context = None if raw else prompt.context
        # A context gives way until the answer has what it wants, but not more than half of the window for it.
        limit = window - min(wanted, window // 2)
        if settings.on_overflow == "truncate_context" and context and len(ids) > limit:
            ids = self._with_shorter_context(prompt, limit)
        room = window - len(ids)
        if room < 1:
            whole = context and settings.on_overflow == "error"  # else all of a context has been cut already
            remedy = 'context, or pass on_overflow="truncate_context"' if whole else "prompt" if raw else "instruction"
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


class TextRequests:
    """The engine's requests for some prompts, and the text that their tokens become.

    Attributes:
        requests: for Engine.submit. Answer `i` of prompt `p` has index `p * num_return_sequences + i`.
    """

    def __init__(
        self,
        generator: TextGenerator,
        prompts: Sequence[Prompt | list[int]],
        settings: GenerationSettings,
        proposer: Callable[[Sequence[int]], Proposer] | None,
    ):
        self.requests: list[Request] = []
        self._streams: list[TextStream] = []
        self._heads: list[str] = []
        for prompt in prompts:
            ids, room = generator.fit(prompt, settings)
            whole = settings.return_full_text and isinstance(prompt, Prompt)
            for sampling in settings.samplings():
                stream = TextStream(generator.tokenizer, tuple(settings.stop), strip=isinstance(prompt, Prompt))
                self._streams.append(stream)
                self._heads.append(f"{prompt.instruction}\n" if whole else "")
                stop_ids = generator.tokenizer.control.stop
                self.requests.append(Request(ids, room, sampling, stop_ids, stream.push, proposer))
        self._texts = [""] * len(self.requests)
        self._counts = [0] * len(self.requests)

    def update(self, token: Token) -> Update | None:
        """Take the next token of the engine; an Update if the text of its answer grew or ended."""
        index = token.index
        stream, request = self._streams[index], self.requests[index]
        self._counts[index] += token.id not in request.stop_ids
        if token.finish_reason:
            stream.finish()
        text = stream.text if token.finish_reason else stream.texts.popleft()
        if not token.finish_reason and text == self._texts[index]:
            return None
        self._texts[index] = text
        return Update(index, self._heads[index] + text, token.finish_reason, self._counts[index], len(request.ids))
