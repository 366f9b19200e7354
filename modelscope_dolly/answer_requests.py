"""What the engine is asked for prompts that fit the window, and the answers that its tokens become."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modelscope_dolly.engine.constraints import Constraint
from modelscope_dolly.engine.sequence import Proposer, Request, Token, TokenLogprob
from modelscope_dolly.engine.settings import Sampling
from modelscope_dolly.errors import PromptError
from modelscope_dolly.generation_settings import GenerationSettings
from modelscope_dolly.prompt import DollyTokenizer
from modelscope_dolly.text_stream import TextStream


class FittedPrompt(NamedTuple):
    """Ids of a prompt.

    Attributes:
        ids: of the prompt.
        room: new tokens that the window leaves, at most as many as the settings want.
        head: text to stand before the answer.
        raw: it was given as ids, and is continued as it is.
    """

    ids: list[int]
    room: int
    head: str = ""
    raw: bool = False


class Choice(NamedTuple):
    """One of the answers that may be chosen.

    Attributes:
        text: the answer.
        logprob: mean log-probability of its tokens.
        probability: softmax of that over all choices.
    """

    text: str
    logprob: float
    probability: float


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
        choices: what was chosen from, in the order of the settings, where they have choices.
    """

    index: int
    text: str
    finish_reason: str | None
    new_tokens: int
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    choices: tuple[Choice, ...] | None = None


class TextRequests:
    """The engine's requests for some prompts, and the text that their tokens become.

    Args:
        constraint: makes what keeps each answer to a form; white space around the text belongs to the form.

    Attributes:
        requests: for Engine.submit. Answer `i` of prompt `p` has index `p * num_return_sequences + i`.
        slots: requests that should run at the same time, at least.
    """

    slots = 1

    def __init__(
        self,
        tokenizer: DollyTokenizer,
        prompts: Sequence[FittedPrompt],
        settings: GenerationSettings,
        proposer: Callable[[Sequence[int]], Proposer] | None = None,
        constraint: Callable[[], Constraint] | None = None,
    ):
        self.requests: list[Request] = []
        self._streams: list[TextStream] = []
        self._heads: list[str] = []
        bad_words = _bad_words(tokenizer, settings)
        for prompt in prompts:
            for sampling in settings.samplings(bad_words):
                stream = TextStream(tokenizer, tuple(settings.stop), strip=not (prompt.raw or constraint))
                self._streams.append(stream)
                self._heads.append(prompt.head)
                stop_ids, on_token = tokenizer.control.stop, stream.push
                request = Request(
                    prompt.ids, prompt.room, sampling, stop_ids, on_token, proposer, constraint=constraint
                )
                self.requests.append(request)
        self._texts = [""] * len(self.requests)
        self._counts = [0] * len(self.requests)
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in self.requests]
        self._with_logprobs = settings.logprobs is not None

    def update(self, token: Token) -> Update | None:
        """Take the next token of the engine; an Update if the text of its answer grew or ended."""
        index = token.index
        stream, request = self._streams[index], self.requests[index]
        if token.id not in request.stop_ids:
            self._counts[index] += 1
            if token.logprob is not None:
                self._logprobs[index].append(token.logprob)
        if token.finish_reason:
            stream.finish()
        text = stream.text if token.finish_reason else stream.texts.popleft()
        if not token.finish_reason and text == self._texts[index]:
            return None
        self._texts[index] = text
        logprobs = tuple(self._logprobs[index]) if self._with_logprobs else None
        used = len(request.ids)
        return Update(index, self._heads[index] + text, token.finish_reason, self._counts[index], used, logprobs)


class ChoiceRequests:
    """The same for answers that are chosen: the likeliest by the mean log-probability of its tokens.

    The mean, so that a longer choice is not unlikely for its length alone. What would end the answer is not counted.

    Attributes:
        requests: for Engine.submit; choice `i` of prompt `p` has index `p * choices + i`.
        slots: requests that should run at the same time, at least.

    Raises:
        PromptError: the window leaves no room for a choice.
    """

    def __init__(self, tokenizer: DollyTokenizer, prompts: Sequence[FittedPrompt], settings: GenerationSettings):
        self._texts, self._heads = tuple(settings.choices), [prompt.head for prompt in prompts]
        given = [tokenizer.encode_text(text) for text in self._texts]
        longest = max(map(len, given))
        for prompt in prompts:
            if prompt.room < longest:
                raise PromptError(
                    f"the longest of the choices has {longest} tokens, and the window leaves {prompt.room} for it; "
                    "shorten the prompt"
                )
        self.requests = [score_request(prompt.ids, ids, settings.logprobs) for prompt in prompts for ids in given]
        self.slots = len(given)
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in self.requests]
        self._with_logprobs = settings.logprobs is not None

    def update(self, token: Token) -> Update | None:
        """Take the next token of the engine; an Update when all choices of a prompt have been scored."""
        self._logprobs[token.index].append(token.logprob)
        count = len(self._texts)
        prompt = token.index // count
        scores = self._logprobs[prompt * count : (prompt + 1) * count]
        asked = self.requests[prompt * count : (prompt + 1) * count]
        if any(len(score) < len(request.given) for score, request in zip(scores, asked, strict=True)):
            return None
        choices = _ranked(self._texts, [sum(one.logprob for one in score) / len(score) for score in scores])
        best = max(range(count), key=lambda place: choices[place].logprob)  # the first of equal ones
        logprobs = tuple(scores[best]) if self._with_logprobs else None
        text = self._heads[prompt] + self._texts[best]
        return Update(prompt, text, "stop", len(scores[best]), len(asked[best].ids), logprobs, choices)


def score_request(ids: Sequence[int], given: Sequence[int], top: int | None) -> Request:
    """To score `given` behind `ids`. Raises PromptError where either is empty."""
    if not ids or not given:
        raise PromptError(f"{len(given)} tokens behind {len(ids)} cannot be scored; both must be at least 1")
    return Request(ids, len(given), Sampling(do_sample=False, logprobs=top or 0), given=tuple(given))


def _ranked(texts: Sequence[str], means: Sequence[float]) -> tuple[Choice, ...]:
    largest = max(means)
    total = sum(math.exp(mean - largest) for mean in means)
    pairs = zip(texts, means, strict=True)
    return tuple(Choice(text, mean, math.exp(mean - largest) / total) for text, mean in pairs)


def _bad_words(tokenizer: DollyTokenizer, settings: GenerationSettings) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word, at the beginning of a text and behind a space."""
    spaced = [f" {word}" for word in settings.bad_words if not word[0].isspace()]
    return tuple(tuple(tokenizer.encode_text(word)) for word in (*settings.bad_words, *spaced))
