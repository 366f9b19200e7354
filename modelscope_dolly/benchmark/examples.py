"""Records with answers that people wrote, as token ids: real text for --lookup and --quality."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from modelscope_dolly.errors import SettingError
from modelscope_dolly.files import read_json_lines

if TYPE_CHECKING:
    from modelscope_dolly.prompt import DollyTokenizer


class Example(NamedTuple):
    """Ids of a prompt and the answer behind it."""

    ids: list[int]
    prompt_tokens: int
    has_context: bool

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.prompt_tokens]

    @property
    def answer(self) -> list[int]:
        return self.ids[self.prompt_tokens :]


def read_records(file: str) -> list[dict]:
    """Records with instruction, response and perhaps context. Raises SettingError with the line."""

    def problem(record: dict) -> str | None:
        texts = all(isinstance(record.get(name), str) for name in ("instruction", "response"))
        return None if texts else "needs the texts instruction and response"

    records = read_json_lines(Path(file), problem)
    if not records:
        raise SettingError(f"{file}: holds no records")
    return records


def encode(tokenizer: DollyTokenizer, records: Sequence[dict], longest_prompt: int) -> Iterator[Example]:
    """The records whose prompt has at most `longest_prompt` tokens."""
    for record in records:
        context = record.get("context")
        ids, prompt_tokens = tokenizer.encode_example(record["instruction"], context, record["response"])
        if prompt_tokens <= longest_prompt:
            yield Example(ids, prompt_tokens, bool(context))


def shuffled(records: Sequence[dict], seed: int) -> list[dict]:
    """A copy in an order that the seed decides."""
    records = list(records)
    random.Random(seed).shuffle(records)
    return records
