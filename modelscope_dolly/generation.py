"""From what a user gives (a question, a record, keywords) to answers: settings, inputs, the window, and the text.

Everything goes through `TextGenerator.stream`; a list, one answer and a stream differ only in who reads its updates.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelscope_dolly.answer_requests import ChoiceRequests, FittedPrompt, TextRequests, Update, score_request
from modelscope_dolly.engine.constraints import Constraint
from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.sequence import Proposer, TokenLogprob
from modelscope_dolly.errors import PromptError, SettingError, is_whole, shown, unknown_name
from modelscope_dolly.generation_settings import MOST_LOGPROBS, GenerationSettings
from modelscope_dolly.prompt import DollyTokenizer, check_instruction, check_text, reduce_conversation

log = logging.getLogger("modelscope.dolly")

#: Slots used for a list when the caller gives no batch_size.
DEFAULT_SLOTS = 8
_QUESTION_KEYS = ("instruction", "text", "messages")
INPUT_KEYS = {*_QUESTION_KEYS, "context"}
#: Of databricks-dolly-15k; a record can be asked as it is.
RECORD_KEYS = {"response", "category"}


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


def perplexity(logprob: float, tokens: int) -> float:
    """exp of the mean negative log-probability; infinite where it is larger than any number."""
    try:
        return math.exp(-logprob / tokens)
    except OverflowError:
        return math.inf


class TextGenerator:
    """Answers prompts with an engine and a tokenizer. Holds no state of a call: safe to use from several threads.

    Args:
        engine: of the network.
        tokenizer: of the network.
        prompt_lookup: makes a proposer of draft tokens from a prompt, where settings ask for it.
        lookup_by_default: what the setting "auto" means here.
        forms: makes what keeps answers to a regex or a JSON schema, see structured.py.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: DollyTokenizer,
        prompt_lookup: Callable[[Sequence[int]], Proposer] | None = None,
        lookup_by_default: bool = False,
        forms: Callable[[str | None, Mapping | None], Callable[[], Constraint]] | None = None,
    ):
        self.engine, self.tokenizer = engine, tokenizer
        self._prompt_lookup, self._lookup_by_default, self._forms = prompt_lookup, lookup_by_default, forms

    def stream(self, prompts: Sequence[Prompt], settings: GenerationSettings, slots: int) -> Iterator[Update]:
        """Yield an Update whenever the text of an answer grew and when it ended.

        Answer `i` of prompt `p` has index `p * num_return_sequences + i`.

        Raises:
            PromptError: an input leaves no room for an answer, see fit.
            HardwareError: see Engine.run.
        """
        asked = self.requests(prompts, settings)
        for token in self.engine.run(asked.requests, max(slots, asked.slots)):
            if update := asked.update(token):
                yield update

    def requests(
        self, prompts: Sequence[Prompt | list[int]], settings: GenerationSettings
    ) -> TextRequests | ChoiceRequests:
        """What the engine is asked for these prompts, for a caller who submits it himself.

        Args:
            prompts: a list of token ids is continued as it is, and white space around the text is kept.
            settings: of all answers.

        Raises:
            PromptError: as stream.
            SettingError: a form that cannot be kept, see structured.py.
        """
        if settings.choices:
            longest = max(len(self.tokenizer.encode_text(text)) for text in settings.choices)
            settings = dataclasses.replace(settings, max_new_tokens=longest)
            return ChoiceRequests(self.tokenizer, [self._fit(prompt, settings) for prompt in prompts], settings)
        lookup = settings.prompt_lookup if settings.prompt_lookup != "auto" else self._lookup_by_default
        proposer = self._prompt_lookup if lookup else None
        constraint = self._constraint(settings)
        fitted = [self._fit(prompt, settings) for prompt in prompts]
        return TextRequests(self.tokenizer, fitted, settings, proposer, constraint)

    def _constraint(self, settings: GenerationSettings) -> Callable[[], Constraint] | None:
        if settings.regex is None and settings.json_schema is None:
            return None
        if self._forms is None:
            raise SettingError("regex and json_schema: this model was loaded without what keeps answers to a form")
        return self._forms(settings.regex, settings.json_schema)

    def _fit(self, prompt: Prompt | list[int], settings: GenerationSettings) -> FittedPrompt:
        raw = not isinstance(prompt, Prompt)
        whole = settings.return_full_text and not raw
        return FittedPrompt(*self.fit(prompt, settings), f"{prompt.instruction}\n" if whole else "", raw)

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings, slots: int) -> list[list[Update]]:
        """The last update of each answer, grouped by prompt."""
        last = {update.index: update for update in self.stream(prompts, settings, slots)}
        count = settings.num_return_sequences
        return [[last[prompt * count + i] for i in range(count)] for prompt in range(len(prompts))]

    def score(self, ids: Sequence[int], begin: int, top: int = 0) -> list[TokenLogprob]:
        """Log-probabilities of ids[begin:], each given all ids before it; of the `top` likeliest in their places, too.

        Raises: as scores.
        """
        return self.scores([(ids, begin)], top, slots=1)[0]

    def scores(
        self, texts: Sequence[tuple[Sequence[int], int]], top: int = 0, slots: int = DEFAULT_SLOTS
    ) -> list[list[TokenLogprob]]:
        """`score` of several (ids, begin), `slots` at the same time. Nothing is generated.

        Raises:
            PromptError: nothing before `begin` or behind it, or more ids than the window has.
            SettingError: `top` is out of range.
        """
        if not is_whole(top, 0, MOST_LOGPROBS):
            raise SettingError(f"top is {shown(top)}, it must be a whole number, 0 to {MOST_LOGPROBS}")
        requests = [score_request(ids[:begin], ids[begin:], top) for ids, begin in texts]
        scores: list[list[TokenLogprob]] = [[] for _ in requests]
        for token in self.engine.run(requests, slots):
            scores[token.index].append(token.logprob)
        return scores

    def encode_answer(self, prompt: Prompt, answer: str, end: bool = False) -> tuple[list[int], int]:
        """Ids of a prompt with its answer, and where the answer begins; for score.

        Args:
            end: with the blank line and the key that end an answer, all that is learned in training.

        Raises:
            PromptError: the answer is no text, or empty.
        """
        if not check_text("answer", answer):
            raise PromptError("the answer is empty: there is nothing to score")
        if not isinstance(end, bool):
            raise SettingError(f"end is {shown(end)}, it must be True or False")
        if end:
            return self.tokenizer.encode_example(prompt.instruction, prompt.context, answer)
        ids = self.tokenizer.encode(prompt.instruction, prompt.context)
        return [*ids, *self.tokenizer.encode_text(answer)], len(ids)

    def details(self, update: Update) -> dict[str, Any]:
        """What an output holds beside the text, as JSON has it: "logprobs" and "choices", where they were asked for."""
        found: dict[str, Any] = {}
        if update.choices is not None:
            found["choices"] = [choice._asdict() for choice in update.choices]
        if update.logprobs is not None:
            found["logprobs"] = [self.logprob_dict(one) for one in update.logprobs]
        return found

    def score_dict(self, score: Sequence[TokenLogprob]) -> dict[str, Any]:
        """{"logprob", "perplexity", "logprobs"} of an answer, see pipeline.DollyTextGenerationPipeline.score."""
        total = math.fsum(one.logprob for one in score)
        logprobs = [self.logprob_dict(one) for one in score]
        return {"logprob": total, "perplexity": perplexity(total, len(score)), "logprobs": logprobs}

    def logprob_dict(self, logprob: TokenLogprob) -> dict[str, Any]:
        """{"id", "token", "logprob", "top": [the same of the likeliest]}; "token" is text, see prompt.token_text."""

        def named(id: int, value: float) -> dict[str, Any]:
            return {"id": id, "token": self.tokenizer.token_text(id), "logprob": value}

        return {**named(logprob.id, logprob.logprob), "top": [named(*pair) for pair in logprob.top]}

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
