"""Rows -> tokenized training records, a report on what was dropped and why, and the held-out split.

sources = read_records("answers.csv", {"instruction": "question"})
checked = check_records(sources, tokenizer, max_length=2048)
print(checked.report)
train, test = split(len(checked.records), test_size=200, seed=42)
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from modelscope_dolly.errors import PromptError, SettingError
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer, check_text
from train.data.data_report import NOTED, DataReport, RecordProblem, SourceReport
from train.data.duplicates import Duplicate, find_duplicates, groups
from train.data.formats import SourceRow, excerpt
from train.data.layouts import FIELDS, REQUIRED, Unusable
from train.data.sources import Source, Sources
from train.distributed import is_first_process

MULTI_TURN = ("drop", "last")


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """A usable record; `context` is "" where there is none. `source` is its number among the sources."""

    instruction: str
    context: str
    response: str
    line: int
    source: int = 0


@dataclass(frozen=True)
class CheckedRecords:
    """The usable records in the order of the sources; one entry of each list per record.

    Attributes:
        ids: token ids of the whole training text, of 4 bytes each.
        prompt_lengths: how many of them are the prompt; those after it are learned.
        repeats: how often each is shown in an epoch, if it is trained on.
        duplicates: records that equal or resemble an earlier one, with it; none where those were dropped.
    """

    records: list[TrainingRecord]
    ids: list[array]
    prompt_lengths: list[int]
    repeats: list[int]
    duplicates: list[Duplicate]
    report: DataReport


def check_records(
    sources: Sources,
    tokenizer: DollyTokenizer,
    max_length: int,
    strict: bool = False,
    multi_turn: str = "drop",
    deduplicate: bool = False,
) -> CheckedRecords:
    """Tokenize every record; keep those that are complete, are text, have a response, and are below the limit.

    Args:
        sources: from read_records.
        tokenizer: with the three keys.
        max_length: records of this many tokens or more are dropped, as in the public recipe.
        strict: refuse to drop any.
        multi_turn: what becomes of a conversation of several questions: "drop", or "last", its last pair.
        deduplicate: drop records that equal or resemble an earlier one.

    Raises:
        RecordsRefused: `strict` and a record is unusable, or none is usable; names the first ten and counts all.
    """
    records, ids, prompts, problems = [], [], [], []
    tokens_dropped = 0
    rows = ((number, part, row) for number, part in enumerate(sources.parts) for row in part.rows)
    # disable=None: no bar where standard error is not a terminal.
    for number, part, row in tqdm(rows, desc="Checking records", unit="record", leave=False,
                                  total=sum(len(part.rows) for part in sources.parts),
                                  disable=not is_first_process() or None):  # fmt: skip
        found = _record(row, part, number, multi_turn)
        if isinstance(found, RecordProblem):
            problems.append(found)
            continue
        record, notes = found
        tokens, prompt = tokenizer.encode_example(record.instruction, record.context, record.response)
        if len(tokens) >= max_length:
            detail = f"{len(tokens):,} tokens, they must be fewer than max_length {max_length:,}"
            problems.append(RecordProblem(row.line, "too_long", detail, excerpt(record.instruction), number))
            tokens_dropped += len(tokens)
            continue
        problems += notes
        records.append(record)
        ids.append(array("i", tokens))
        prompts.append(prompt)
    duplicates = find_duplicates(records)
    problems += _duplicate_notes(records, duplicates, sources.parts, deduplicate)
    if deduplicate and duplicates:
        dropped = {duplicate.later for duplicate in duplicates}
        gone = {(records[index].source, records[index].line) for index in dropped}
        problems = [problem for problem in problems
                    if problem.kind not in NOTED or (problem.source, problem.line) not in gone]  # fmt: skip
        records, ids, prompts = (
            [value for i, value in enumerate(values) if i not in dropped] for values in (records, ids, prompts)
        )
        duplicates = []
    problems.sort(key=lambda problem: (problem.source, problem.line))
    report = _report(sources, records, ids, prompts, tokens_dropped, problems)
    if not records:
        raise report.refusal(f"none of the {report.rows:,} records is usable", "Repair them")
    if strict and report.unusable:
        lost = f"strict is on and {report.unusable:,} of {report.rows:,} records are unusable"
        raise report.refusal(lost, "Repair them, or turn strict off to drop them")
    repeats = [sources.parts[record.source].entry.repeat for record in records]
    return CheckedRecords(records, ids, prompts, repeats, duplicates, report)


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


def shown_in_an_epoch(train: Sequence[int], repeats: Sequence[int]) -> list[int]:
    """The indices of training records, each as often as its source says."""
    return [index for index in train for _ in range(repeats[index])]


def with_split(checked: CheckedRecords, held_out: Sequence[int]) -> DataReport:
    """The report with what only the split tells: held-out records by source, and those that training records give away.

    Args:
        checked: the records.
        held_out: which of them.
    """
    report, records = checked.report, checked.records
    counts = Counter(records[index].source for index in held_out)
    sources = tuple(replace(source, held_out=counts[number]) for number, source in enumerate(report.sources))
    group = groups(len(records), checked.duplicates)
    held = set(held_out)
    trained: dict[int, int] = {}
    for index, same in enumerate(group):
        if index not in held:
            trained.setdefault(same, index)
    notes = []
    for index in held_out:
        if group[index] in trained:
            record, other = records[index], records[trained[group[index]]]
            detail = f"held out, and the training record in {_place(other, record, report.sources)} says the same"
            notes.append(RecordProblem(record.line, "leak", detail, excerpt(record.instruction), record.source))
    problems = sorted([*report.problems, *notes], key=lambda problem: (problem.source, problem.line))
    return replace(report, sources=sources, problems=tuple(problems))


def _report(
    sources: Sources, records: list[TrainingRecord], ids: list[array], prompts: list[int], tokens_dropped: int,
    problems: list[RecordProblem],
) -> DataReport:  # fmt: skip
    kept = Counter(record.source for record in records)
    parts = tuple(
        SourceReport(
            part.name, part.layout.name, part.unit, part.unused, part.total, len(part.rows), kept[number],
            part.entry.repeat,
        )
        for number, part in enumerate(sources.parts)
    )  # fmt: skip
    total = sum(map(len, ids))
    return DataReport(parts, sources.sha256, total, total - sum(prompts), tokens_dropped, tuple(problems))


def _record(
    row: SourceRow, source: Source, number: int, multi_turn: str
) -> tuple[TrainingRecord, list[RecordProblem]] | RecordProblem:
    """The record in a row, with notes on it; or why there is none."""

    def problem(kind: str, detail: str, about: Any) -> RecordProblem:
        return RecordProblem(row.line, kind, detail, excerpt(about), number)

    if row.problem:
        return problem(*row.problem, row.value)
    if not row.is_object:
        return problem(
            "wrong_type", f"an object with the columns is needed, found {type(row.value).__name__}", row.value
        )
    try:
        reduced = source.reduce(row)
    except Unusable as error:
        kind, detail = error.args
        return problem(kind, detail, row.value)
    values = {field: reduced.fields.get(field) for field in FIELDS}
    values["context"] = "" if values["context"] is None else values["context"]
    columns = {field: source.layout.columns.get(field, field) for field in reduced.fields}
    problems = [found for field in columns if (found := _field_problem(field, columns[field], values[field]))]
    text = next((value for value in values.values() if isinstance(value, str) and value.strip()), row.value)
    if problems:
        return problem(problems[0][0], "; ".join(detail for _, detail in problems), text)
    if reduced.turns > 1 and multi_turn == "drop":
        return problem("multi_turn", f"{reduced.turns} turns; multi_turn: last would take the last pair", text)
    record = TrainingRecord(**values, line=row.line, source=number)
    notes = [problem("contains_key", detail, record.instruction) for detail in _typed_keys(record)]
    if reduced.turns > 1:
        notes.append(problem("last_pair", f"the last of {reduced.turns} turns", record.instruction))
    return record, notes


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


def _typed_keys(record: TrainingRecord) -> Iterator[str]:
    """What to note about a text with a key in it."""
    text = (record.instruction, record.context, record.response)
    # The line break that the template puts after a field can complete the response key.
    typed = [key for key in (*CONTROL_KEYS, END_OF_TEXT) if any(key in f"{part}\n" for part in text)]
    if typed:
        yield f"{', '.join(map(repr, typed))} is trained as ordinary text"


def _duplicate_notes(
    records: Sequence[TrainingRecord], duplicates: Sequence[Duplicate], sources: Sequence[Source], removed: bool
) -> Iterator[RecordProblem]:
    for duplicate in duplicates:
        record, first = records[duplicate.later], records[duplicate.first]
        kind = "duplicate" if duplicate.exact else "near_duplicate"
        how = "equal to" if duplicate.exact else f"{100 * duplicate.similarity:.0f} % like"
        yield RecordProblem(
            record.line, f"removed_{kind}" if removed else kind, f"{how} {_place(first, record, sources)}",
            excerpt(record.instruction), record.source,
        )  # fmt: skip


def _place(record: TrainingRecord, seen_from: TrainingRecord, sources: Sequence[Source | SourceReport]) -> str:
    """`line 3`, with the name of its source where that is another one."""
    source = sources[record.source]
    return f"{source.unit} {record.line}{f' of {source.name}' if record.source != seen_from.source else ''}"
