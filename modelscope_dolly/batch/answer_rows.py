"""Answers the rows of a batch: as many at once as the engine has slots, each written when it is finished."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from modelscope_dolly.answer_requests import ChoiceRequests, TextRequests
from modelscope_dolly.batch.input_rows import Row
from modelscope_dolly.batch.row_file import RowFile
from modelscope_dolly.engine.engine import SLOTS, Call
from modelscope_dolly.errors import HardwareError, PromptError
from modelscope_dolly.generation import TextGenerator
from modelscope_dolly.generation_settings import GenerationSettings

#: Rows that the engine knows of, for each slot: a slot whose answer has ended takes the next at once.
AHEAD = 2
#: Seconds between lines of progress where there is no terminal.
LINE_EVERY = 30.0
#: Of an answer, in its line.
_FACTS = ("text", "finish_reason", "prompt_tokens", "new_tokens")


class Progress:
    """How far a batch is: a bar on a terminal, elsewhere a line now and then.

    Args:
        total: rows of the input.
        done: of them when this run began.
        say: prints a line.
    """

    def __init__(self, total: int, done: int, say: Callable[[str], None]):
        self._total, self._begun_with, self._say = total, done, say
        self._begun = self._said = time.monotonic()
        self.done, self.new_tokens = done, 0
        self._bar = tqdm(total=total, initial=done, unit="row", desc="Answering", disable=None)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def add(self, new_tokens: int) -> None:
        """One more row is done."""
        self.done += 1
        self.new_tokens += new_tokens
        speed = f"{self.new_tokens / max(self.seconds, 1e-9):,.1f} tokens/s"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            left = self.seconds / (self.done - self._begun_with) * (self._total - self.done)
            self._say(f"{self.done:,} of {self._total:,} rows, {speed}, {tqdm.format_interval(left)} left")

    def close(self) -> None:
        self._bar.close()


def row_seed(seed: int, index: int) -> int:
    """The seed of one row. Sums would give two runs with neighbouring seeds the same seeds, one row apart."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:4], "big")


def answer_rows(
    rows: Iterator[Row],
    generator: TextGenerator,
    settings: GenerationSettings,
    answers: RowFile,
    problems: RowFile,
    progress: Progress,
) -> None:
    """Answer all rows, in this thread, which takes all turns of the engine meanwhile.

    Args:
        rows: to be answered.
        generator: answers them.
        settings: of all answers; `seed` is that of the batch.
        answers: gets index, text, finish_reason, prompt_tokens, new_tokens and seed of each answer, and its
            log-probabilities or choices where the settings have them.
        problems: gets index, line and error of each row that asks nothing that can be answered.
        progress: told of each row.

    Raises:
        DollyError: of the device, or a file cannot be written. What is in the files stays.
    """
    engine = generator.engine
    most = AHEAD * (engine.slots or SLOTS)
    asked: dict[Call, _Asked] = {}

    def submit() -> None:
        """Keep the engine supplied; let it rest when all is done."""
        while len(asked) < most and (row := next(rows, None)):
            try:
                one = _Asked(row, generator, settings)
            except PromptError as error:
                problems.append({"index": row.index, "line": row.line, "error": str(error)})
                progress.add(0)
                continue
            try:
                asked[engine.submit(one.text.requests)] = one
            except HardwareError as error:  # no memory: another machine may have it, so it is no bad row
                raise HardwareError(f"line {row.line}: {error}") from None
        if not asked:
            engine.rest()

    def deliver(calls: set[Call]) -> None:
        for call in calls:
            one = asked[call]
            for token in call.take():
                update = one.text.update(token)
                if update and update.finish_reason:
                    facts = {name: getattr(update, name) for name in _FACTS}
                    answers.append({"index": one.row.index, **facts, "seed": one.seed, **generator.details(update)})
                    progress.add(update.new_tokens)
                    del asked[call]
        submit()

    try:
        submit()
        engine.work(deliver)
    finally:
        for call in asked:
            call.close()


class _Asked:
    """A row that the engine works on. Raises PromptError where it asks nothing that can be answered."""

    def __init__(self, row: Row, generator: TextGenerator, settings: GenerationSettings):
        if row.prompt is None:
            raise PromptError(row.problem)
        self.row, self.seed = row, None
        if settings.do_sample and settings.seed is not None:
            self.seed = row_seed(settings.seed, row.index)
            settings = dataclasses.replace(settings, seed=self.seed)
        self.text: TextRequests | ChoiceRequests = generator.requests([row.prompt], settings)
