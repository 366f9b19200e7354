"""The records that two models are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelscope_dolly.errors import PromptError, SettingError
from modelscope_dolly.files import read_json_lines
from modelscope_dolly.prompt import check_instruction, check_text


@dataclass(frozen=True)
class HeldOutRecord:
    """An instruction, and the answer that a person gave; `context` and `response` are "" where there is none."""

    instruction: str
    context: str = ""
    response: str = ""


def read_held_out(path: Path, limit: int | None = None) -> list[HeldOutRecord]:
    """The first `limit` records of a .jsonl file with instruction, and perhaps context and response.

    Raises:
        SettingError: names the line of a record that cannot be asked; or there is none.
    """

    def problem(row: dict) -> str | None:
        try:
            check_instruction(row.get("instruction"))
            for name in ("context", "response"):
                check_text(name, row.get(name) or "")
        except PromptError as error:
            return str(error)
        return None

    rows = read_json_lines(path, problem)
    if not rows:
        raise SettingError(f"{path}: holds no records")
    fields = ("instruction", "context", "response")
    return [HeldOutRecord(*(row.get(name) or "" for name in fields)) for row in rows[:limit]]


def spread(records: Sequence[HeldOutRecord], count: int) -> list[HeldOutRecord]:
    """`count` of the records, at even distances; all of them where there are no more."""
    count = min(count, len(records))
    return [records[number * len(records) // count] for number in range(count)]
