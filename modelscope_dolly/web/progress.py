"""From a filled-in form to an answer that grows, and what is told about it. No gradio here."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from modelscope_dolly.errors import DollyError, PromptError
from modelscope_dolly.generation import GenerationSettings, TextGenerator, parse_input
from modelscope_dolly.generation_settings import SEEDS

#: Seconds between two updates of the page at least. Redrawing takes a browser and gradio a few milliseconds each.
INTERVAL = 0.05


@dataclass(frozen=True)
class Progress:
    """An answer so far.

    Attributes:
        text: of the answer.
        new_tokens, prompt_tokens: counts.
        seconds: since the question was asked, the reading of the prompt included.
        seed: that repeats it; None where nothing is drawn at random.
        ended: "stop" or "length"; None while it goes on.
    """

    text: str = ""
    new_tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    seed: int | None = None
    ended: str | None = None


def ask(
    text_generator: TextGenerator, instruction: str, context: str | None, settings: GenerationSettings
) -> Iterator[Progress]:
    """Yield the answer as it grows, at most every INTERVAL, and when it has ended. Closing cancels it.

    Raises:
        DollyError.
    """
    prompt = parse_input({"instruction": instruction, "context": context})
    if settings.do_sample and settings.seed is None:
        settings = dataclasses.replace(settings, seed=secrets.randbelow(SEEDS))
    begun, shown = time.perf_counter(), float("-inf")
    for update in text_generator.stream([prompt], settings, slots=1):
        now = time.perf_counter()
        if update.finish_reason or now - shown >= INTERVAL:
            shown = now
            seed = settings.seed if settings.do_sample else None
            yield Progress(
                update.text, update.new_tokens, update.prompt_tokens, now - begun, seed, update.finish_reason
            )


def settings_of(form: dict[str, Any]) -> GenerationSettings:
    """The settings of a form, whose empty fields are None or "". Raises SettingError."""
    given = {name: value for name, value in form.items() if value not in (None, "")}
    if isinstance(given.get("seed"), str) and given["seed"].strip().isdecimal():
        given["seed"] = int(given["seed"])
    given["stop"] = [line for line in given.pop("stop_texts", "").splitlines() if line]
    given["on_overflow"] = "truncate_context" if given.pop("truncate_context", False) else "error"
    return GenerationSettings().updated(given)


def status(progress: Progress, words: dict[str, str], cancelled: bool = False) -> str:
    """One line about an answer, without markup."""
    speed = progress.new_tokens / max(progress.seconds, 1e-6)
    if progress.ended is None and not cancelled:
        return words["running"].format(tokens=progress.new_tokens, speed=speed)
    facts = words["facts"].format(
        tokens=progress.new_tokens, seconds=progress.seconds, speed=speed, prompt=progress.prompt_tokens
    )
    seed = "" if progress.seed is None else words["facts_seed"].format(seed=progress.seed)
    ended = words[f"ended_{progress.ended or 'cancelled'}"]
    return f"{ended} · {facts}{seed}"


def explain(
    error: DollyError, text_generator: TextGenerator, instruction: str, context: str | None, words: dict[str, str]
) -> str:
    """What went wrong, in the words of the page."""
    if not instruction.strip():
        return words["empty"]
    if isinstance(error, PromptError):
        try:
            prompt = parse_input({"instruction": instruction, "context": context})
            tokens = len(text_generator.tokenizer.encode(prompt.instruction, prompt.context))
        except DollyError:  # text that is not Unicode
            tokens = 0
        if tokens >= text_generator.engine.window:
            return words["too_long"].format(tokens=tokens, window=text_generator.engine.window)
    return words["failed"].format(message=error)
