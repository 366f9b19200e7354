"""Rows -> tokenized training records, a report on what was dropped and why, and the held-out split.

source = read_records("answers.csv", {"instruction": "question"})
checked = check_records(source, tokenizer, max_length=2048)
print(checked.report)
train, test = split(len(checked.records), test_size=200, seed=42)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from modelscope_dolly.errors import DollyError, PromptError, SettingError
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer, check_text
from train.data.formats import SourceRow, excerpt
from train.data.sources import FIELDS, REQUIRED, Source
from train.distributed import is_first_process

#: Why a record is dropped, and what is noted about one that is kept.
DROPPED = ("not_utf8", "not_json", "wrong_type", "missing", "empty_instruction", "empty_response", "too_long")
NOTED = ("contains_key", "duplicate")
SHOWN = 10  # problems of each group that a report shows in full


@dataclass(frozen=True)
class TrainingRecord:
    """A usable record; `context` is "" where there is none."""

    instruction: str
    context: str
    response: str
    line: int


@dataclass(frozen=True)
class RecordProblem:
    """Why a record was dropped, or a note about one that was kept."""

    line: int
    kind: str
    detail: str
    excerpt: str

    def __str__(self) -> str:
        return f"{self.line}: {self.kind}, {self.detail}: {self.excerpt}"


@dataclass(frozen=True)
class DataReport:
    """What became of every row. `tokens_dropped` counts records that are too long: the others have no training text.

    `str(report)` is for the terminal, `as_dict()` for JSON. Both show the first ten problems of each group; `problems`
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
    problems: tuple[RecordProblem, ...]

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
        dropped = self.rows - self.kept
        lines = [
            f"{self.name}: {self.rows:,} records, {self.kept:,} kept with {self.tokens_kept:,} tokens "
            f"({self.label_tokens_kept:,} to learn), {dropped:,} dropped with {self.tokens_dropped:,} tokens"
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

    def refusal(self, why: str, remedy: str) -> DollyError:
        """An error to raise that lists the dropped records on one line."""
        first = "; ".join(f"{self.unit} {problem}" for problem in self._first(DROPPED))
        more = self.rows - self.kept - SHOWN
        rest = f"; and {more:,} more" if more > 0 else ""
        return DollyError(f"{self.name}: {why} ({_counted(self.dropped)}): {first}{rest}. {remedy}")

    def _count(self, kinds: tuple[str, ...]) -> dict[str, int]:
        counts = Counter(problem.kind for problem in self.problems)
        return {kind: counts[kind] for kind in kinds}

    def _first(self, kinds: tuple[str, ...]) -> list[RecordProblem]:
        return [problem for problem in self.problems if problem.kind in kinds][:SHOWN]


@dataclass(frozen=True)
class CheckedRecords:
    """The usable records in file order; one entry of each list per record.

    Attributes:
        ids: token ids of the whole training text.
        prompt_lengths: how many of them are the prompt; those after it are learned.
    """

    records: list[TrainingRecord]
    ids: list[list[int]]
    prompt_lengths: list[int]
    report: DataReport


def check_records(source: Source, tokenizer: DollyTokenizer, max_length: int, strict: bool = False) -> CheckedRecords:
    """Tokenize every record; keep those that are complete, are text, have a response, and are below the limit.

    Args:
        source: from read_records.
        tokenizer: with the three keys.
        max_length: records of this many tokens or more are dropped, as in the public recipe.
        strict: refuse to drop any.

    Raises:
        DollyError: `strict` and a record is unusable, or none is usable; names the first ten and counts all.
    """
    records, ids, prompts, problems = [], [], [], []
    seen: dict[tuple[str, str, str], int] = {}
    tokens_dropped = 0
    # disable=None: no bar where standard error is not a terminal.
    for row in tqdm(source.rows, desc="Checking records", unit="record", disable=not is_first_process() or None):
        record = _record(row, source.columns)
        if isinstance(record, RecordProblem):
            problems.append(record)
            continue
        tokens, prompt = tokenizer.encode_example(record.instruction, record.context, record.response)
        if len(tokens) >= max_length:
            detail = f"{len(tokens):,} tokens, they must be fewer than max_length {max_length:,}"
            problems.append(RecordProblem(row.line, "too_long", detail, excerpt(record.instruction)))
            tokens_dropped += len(tokens)
            continue
        problems += _notes(record, seen, source.unit)
        records.append(record)
        ids.append(tokens)
        prompts.append(prompt)
    total = sum(map(len, ids))
    report = DataReport(
        source.name, source.sha256, source.unit, source.unused, len(source.rows), len(records),
        total, total - sum(prompts), tokens_dropped, tuple(problems),
    )  # fmt: skip
    if not records:
        raise report.refusal(f"none of the {report.rows:,} records is usable", "Repair them")
    if strict and report.kept < report.rows:
        lost = f"strict is on and {report.rows - report.kept:,} of {report.rows:,} records are unusable"
        raise report.refusal(lost, "Repair them, or turn strict off to drop them")
    return CheckedRecords(records, ids, prompts, report)


def split(count: int, test_size: int, seed: int) -> tuple[list[int], list[int]]:
    """Which of `count` records are trained on and which are held out: two sorted lists of indices.

    Each record draws one number from `random.Random(seed).random()`, the only sequence of that module that Python
    guarantees across versions; the `test_size` smallest are held out. So the split is the same on every machine.

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


def _record(row: SourceRow, columns: Mapping[str, str]) -> TrainingRecord | RecordProblem:
    if row.problem:
        return RecordProblem(row.line, *row.problem, excerpt(row.value))
    if not row.is_object:
        detail = f"an object with the columns is needed, found {type(row.value).__name__}"
        return RecordProblem(row.line, "wrong_type", detail, excerpt(row.value))
    values = {field: row.value.get(columns.get(field)) for field in FIELDS}
    values["context"] = "" if values["context"] is None else values["context"]
    problems = [problem for field in columns if (problem := _field_problem(field, columns[field], values[field]))]
    if not problems:
        return TrainingRecord(**values, line=row.line)
    detail = "; ".join(detail for _, detail in problems)
    text = next((value for value in values.values() if isinstance(value, str) and value.strip()), row.value)
    return RecordProblem(row.line, problems[0][0], detail, excerpt(text))


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


def _notes(record: TrainingRecord, seen: dict[tuple[str, str, str], int], unit: str) -> Iterator[RecordProblem]:
    """Notes about a usable record; adds it to `seen` (text -> the line where it was first)."""
    text = (record.instruction, record.context, record.response)
    # The line break that the template puts after a field can complete the response key.
    typed = [key for key in (*CONTROL_KEYS, END_OF_TEXT) if any(key in f"{part}\n" for part in text)]
    if typed:
        names = ", ".join(map(repr, typed))
        yield RecordProblem(
            record.line, "contains_key", f"{names} is trained as ordinary text", excerpt(record.instruction)
        )
    first = seen.setdefault(text, record.line)
    if first != record.line:
        yield RecordProblem(record.line, "duplicate", f"equal to {unit} {first}", excerpt(record.instruction))


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)
