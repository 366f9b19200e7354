"""Check all instruction records before anything else happens.

    source = read_records("answers.csv", {"instruction": "question"})
    checked = check_records(source, tokenizer, max_length=2048)
    print(checked.report)
    train, test = split(len(checked.records), test_size=200, seed=42)

A record is an instruction, perhaps a context, and a response. What cannot be used is dropped and counted, not
silently lost.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from modelscope_dolly.errors import DollyError, PromptError, SettingError
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer, check_text
from train.data.sources import FIELDS, REQUIRED, Row, Source, excerpt, is_object

#: Why a record is dropped, and what is only told about one that is kept.
DROPPED = ("not_utf8", "not_json", "wrong_type", "missing", "empty_instruction", "empty_response", "too_long")
NOTED = ("contains_key", "duplicate")
SHOWN = 10  # problems of each sort that a report shows in full


@dataclass(frozen=True)
class Record:
    """A usable record; `context` is "" where there is none."""

    instruction: str
    context: str
    response: str
    line: int


@dataclass(frozen=True)
class Problem:
    """One thing wrong, or worth knowing, about one record."""

    line: int
    kind: str
    detail: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.line}: {self.kind}, {self.detail}: {self.excerpt}"


@dataclass(frozen=True)
class Report:
    """What became of every row. `tokens_dropped` are those of too long records: the others have no training text.

    `str(report)` is for the terminal, `as_dict()` for JSON. Both show the first ten problems of each sort; `problems`
    holds all, in file order.
    """

    name: str
    sha256: str
    unit: str
    unused: tuple[str, ...]
    rows: int
    kept: int
    tokens_kept: int
    label_tokens_kept: int
    tokens_dropped: int
    problems: tuple[Problem, ...]

    def __post_init__(self) -> None:
        assert self.rows == self.kept + sum(self.dropped.values()), "a record vanished unreported"

    @property
    def dropped(self) -> dict[str, int]:
        """Records dropped, by kind. A record counts once, under the first thing wrong with it."""
        return self._count(DROPPED)

    @property
    def noted(self) -> dict[str, int]:
        """Notes about kept records, by kind."""
        return self._count(NOTED)

    def as_dict(self) -> dict[str, Any]:
        values = {**vars(self), "unused": list(self.unused), "dropped": self.dropped, "noted": self.noted}
        return {**values, "problems": [asdict(problem) for kinds in (DROPPED, NOTED) for problem in self._first(kinds)]}

    def __str__(self) -> str:
        lost = self.rows - self.kept
        lines = [
            f"{self.name}: {self.rows:,} records, {self.kept:,} kept with {self.tokens_kept:,} tokens "
            f"({self.label_tokens_kept:,} to learn), {lost:,} dropped with {self.tokens_dropped:,} tokens"
        ]
        if self.unused:
            lines.append(f"  columns not used: {', '.join(self.unused)}")
        for title, kinds, counts in (("dropped", DROPPED, self.dropped), ("kept, but note", NOTED, self.noted)):
            if any(counts.values()):
                lines.append(f"  {title}: {_counted(counts)}")
                lines += [f"    {self.unit} {problem}" for problem in self._first(kinds)]
                more = sum(counts.values()) - SHOWN
                lines += [f"    and {more:,} more"] if more > 0 else []
        return "\n".join(lines)

    def refusal(self, why: str, repair: str) -> DollyError:
        """The drops in one line, to raise."""
        first = "; ".join(f"{self.unit} {problem}" for problem in self._first(DROPPED))
        more = self.rows - self.kept - SHOWN
        rest = f"; and {more:,} more" if more > 0 else ""
        return DollyError(f"{self.name}: {why} ({_counted(self.dropped)}): {first}{rest}. {repair}")

    def _count(self, kinds: tuple[str, ...]) -> dict[str, int]:
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in kinds}

    def _first(self, kinds: tuple[str, ...]) -> list[Problem]:
        return [problem for problem in self.problems if problem.kind in kinds][:SHOWN]


@dataclass(frozen=True)
class Checked:
    """The usable records in file order; one entry of each list per record.

    Attributes:
        ids: token ids of the whole training text.
        prompt_lengths: how many of them are the prompt; those behind it are learned.
    """

    records: list[Record]
    ids: list[list[int]]
    prompt_lengths: list[int]
    report: Report

    @property
    def lengths(self) -> list[int]:
        """Tokens of each training text."""
        return [len(ids) for ids in self.ids]


def check_records(source: Source, tokenizer: DollyTokenizer, max_length: int, strict: bool = False) -> Checked:
    """Tokenize every record and keep the usable ones: whole, of text, with something to learn, shorter than the limit.

    Args:
        max_length: records of so many tokens or more are dropped, as in the public recipe.
        strict: refuse to drop any.

    Raises:
        DollyError: `strict` and a record is unusable, or none is usable; names the first ten and counts all.
    """
    records, ids, prompts, problems = [], [], [], []
    seen: dict[tuple[str, str, str], int] = {}
    tokens_dropped = 0
    for row in tqdm(source.rows, desc="Checking records", unit="record", disable=_quiet()):
        record = _record(row, source.columns)
        if isinstance(record, Problem):
            problems.append(record)
            continue
        tokens, prompt = tokenizer.encode_example(record.instruction, record.context, record.response)
        if len(tokens) >= max_length:
            detail = f"{len(tokens):,} tokens, they must be fewer than max_length {max_length:,}"
            problems.append(Problem(row.line, "too_long", detail, excerpt(record.instruction)))
            tokens_dropped += len(tokens)
            continue
        problems += _notes(record, seen, source.unit)
        records.append(record)
        ids.append(tokens)
        prompts.append(prompt)
    total = sum(map(len, ids))
    report = Report(
        source.name, source.sha256, source.unit, source.unused, len(source.rows), len(records),
        total, total - sum(prompts), tokens_dropped, tuple(problems),
    )  # fmt: skip
    if not records:
        raise report.refusal(f"none of the {report.rows:,} records is usable", "Repair them")
    if strict and report.kept < report.rows:
        lost = f"strict is on and {report.rows - report.kept:,} of {report.rows:,} records are unusable"
        raise report.refusal(lost, "Repair them, or turn strict off to drop them")
    return Checked(records, ids, prompts, report)


def split(count: int, test_size: int, seed: int) -> tuple[list[int], list[int]]:
    """Which of `count` records are trained on and which are held out: two sorted lists of indices.

    Each record draws one number from `random.Random(seed).random()`, the only part of that module whose values Python
    keeps for ever; the `test_size` smallest are held out. So the split is the same on every machine.

    Raises:
        SettingError: nothing would be left to train on.
    """
    if not 0 <= test_size < count:
        raise SettingError(
            f"test_size is {test_size}, it must be at least 0 and below the number of usable records, {count}: "
            "hold out fewer or add records"
        )
    draw = random.Random(seed).random
    drawn = [draw() for _ in range(count)]
    order = sorted(range(count), key=drawn.__getitem__)
    return sorted(order[test_size:]), sorted(order[:test_size])


def _record(row: Row, columns: Mapping[str, str]) -> Record | Problem:
    if row.problem:
        return Problem(row.line, *row.problem, excerpt(row.value))
    if not is_object(row):
        detail = f"an object with the columns is needed, found {type(row.value).__name__}"
        return Problem(row.line, "wrong_type", detail, excerpt(row.value))
    values = {field: row.value.get(columns.get(field)) for field in FIELDS}
    values["context"] = "" if values["context"] is None else values["context"]
    wrong = [found for field in columns if (found := _field_problem(field, columns[field], values[field]))]
    if not wrong:
        return Record(**values, line=row.line)
    detail = "; ".join(detail for _, detail in wrong)
    text = next((value for value in values.values() if isinstance(value, str) and value.strip()), row.value)
    return Problem(row.line, wrong[0][0], detail, excerpt(text))


def _field_problem(field: str, column: str, value: Any) -> tuple[str, str] | None:
    """(kind, detail) of what makes the field unusable."""
    if value is None:
        return "missing", f"no {column}"
    if not isinstance(value, str):
        return "wrong_type", f"{column} must be text, found {type(value).__name__}"
    try:
        check_text(column, value)
    except PromptError as error:
        return "wrong_type", str(error)
    if field in REQUIRED and not value.strip():
        return f"empty_{field}", f"{column} is empty"
    return None


def _notes(record: Record, seen: dict[tuple[str, str, str], int], unit: str) -> Iterator[Problem]:
    """What is worth knowing about a usable record; remembers it in `seen`."""
    text = (record.instruction, record.context, record.response)
    # The template's line break behind a field can complete the response key.
    typed = [key for key in (*CONTROL_KEYS, END_OF_TEXT) if any(key in f"{part}\n" for part in text)]
    if typed:
        names = ", ".join(map(repr, typed))
        yield Problem(record.line, "contains_key", f"{names} is trained as ordinary text", excerpt(record.instruction))
    first = seen.setdefault(text, record.line)
    if first != record.line:
        yield Problem(record.line, "duplicate", f"equal to {unit} {first}", excerpt(record.instruction))


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)


def _quiet() -> bool | None:
    """For tqdm: no bar but in the first process, and there only on a terminal."""
    return True if os.environ.get("RANK", "0") != "0" else None
