"""What became of every row of the data: counts by source and by problem, for people, for JSON, and whole in a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import DollyError
from modelscope_dolly.files import write_atomically

#: Why a record is dropped: it cannot be used, or `deduplicate` is on.
UNUSABLE = (
    "not_utf8", "not_json", "wrong_type", "missing", "empty_instruction", "empty_response", "multi_turn", "too_long",
)  # fmt: skip
REMOVED = ("removed_duplicate", "removed_near_duplicate")
DROPPED = (*UNUSABLE, *REMOVED)
#: What is noted about one that is kept. A leak is a held-out record that a training record equals or resembles.
NOTED = ("contains_key", "duplicate", "near_duplicate", "last_pair", "leak")
SHOWN = 10  # problems of each of the two groups that a report shows
PROBLEMS_FILE = "data_problems.jsonl"


@dataclass(frozen=True)
class RecordProblem:
    """Why a record was dropped, or a note about one that was kept. `source` is its number among the sources."""

    line: int
    kind: str
    detail: str
    excerpt: str
    source: int = 0

    def __str__(self) -> str:
        return f"{self.line}: {self.kind}, {self.detail}: {self.excerpt}"


@dataclass(frozen=True)
class SourceReport:
    """Counts of one file or data set.

    Attributes:
        name, unit, unused: see sources.Source.
        layout: what its columns were recognised as.
        rows: all of it. taken: those that were checked. kept: usable ones. held_out: of these.
        repeat: how often a training record is shown in an epoch.
    """

    name: str
    layout: str
    unit: str
    unused: tuple[str, ...]
    rows: int
    taken: int
    kept: int
    repeat: int = 1
    held_out: int = 0

    def __str__(self) -> str:
        parts = [f"{self.rows:,} records"]
        if self.taken < self.rows:
            parts.append(f"{self.taken:,} taken")
        parts.append(f"{self.kept:,} kept")
        if self.held_out:
            parts.append(f"{self.held_out:,} of them held out")
        if self.repeat > 1:
            parts.append(f"each shown {self.repeat} times in an epoch")
        return f"{self.name} ({self.layout}): {', '.join(parts)}"


@dataclass(frozen=True)
class DataReport:
    """What became of every row. `tokens_dropped` counts records that are too long: the others have no training text.

    `str(report)` is for the terminal, `as_dict()` for JSON. Both show the first ten problems of each group; `problems`
    holds all, in the order of the sources.
    """

    sources: tuple[SourceReport, ...]
    sha256: str
    tokens_kept: int
    label_tokens_kept: int
    tokens_dropped: int
    problems: tuple[RecordProblem, ...]

    def __post_init__(self) -> None:
        assert self.rows == self.kept + sum(self.dropped.values()), "a record vanished unreported"

    @property
    def name(self) -> str:
        return self.sources[0].name if len(self.sources) == 1 else f"{len(self.sources)} sources"

    @property
    def rows(self) -> int:
        """Records that were checked."""
        return sum(source.taken for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def dropped(self) -> dict[str, int]:
        """Records dropped, by kind. A record counts once, under the first thing wrong with it."""
        return self._count(DROPPED)

    @property
    def unusable(self) -> int:
        """Records dropped for what is wrong with them."""
        return sum(self._count(UNUSABLE).values())

    @property
    def noted(self) -> dict[str, int]:
        """Notes about kept records, by kind."""
        return self._count(NOTED)

    def as_dict(self) -> dict[str, Any]:
        shown = [self._as_dict(problem) for kinds in (DROPPED, NOTED) for problem in self._first(kinds)]
        return {
            "name": self.name, **vars(self), "rows": self.rows, "kept": self.kept,
            "sources": [{**asdict(source), "unused": list(source.unused)} for source in self.sources],
            "problems": shown, "dropped": self.dropped, "noted": self.noted,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"{self._title()}: {self.rows:,} records, {self.kept:,} kept with {self.tokens_kept:,} tokens "
            f"({self.label_tokens_kept:,} to learn), {self.rows - self.kept:,} dropped with {self.tokens_dropped:,} "
            "tokens"
        ]
        if len(self.sources) > 1 or self.sources[0].repeat > 1 or self.sources[0].taken < self.sources[0].rows:
            lines += [f"  {source}" for source in self.sources]
        for source in self.sources:
            if source.unused:
                of = f" of {source.name}" if len(self.sources) > 1 else ""
                lines.append(f"  columns not used{of}: {', '.join(source.unused)}")
        for title, kinds, counts in (("dropped", DROPPED, self.dropped), ("kept, but note", NOTED, self.noted)):
            if any(counts.values()):
                lines.append(f"  {title}: {counted(counts)}")
                lines += [f"    {self._placed(problem)}" for problem in self._first(kinds)]
                more = sum(counts.values()) - SHOWN
                lines += [f"    and {more:,} more"] if more > 0 else []
        return "\n".join(lines)

    def refusal(self, why: str, remedy: str) -> RecordsRefused:
        """An error to raise that lists unusable records on one line."""
        first = "; ".join(self._placed(problem) for problem in self._first(UNUSABLE))
        more = self.unusable - SHOWN
        rest = f"; and {more:,} more" if more > 0 else ""
        counts = counted(self._count(UNUSABLE))
        return RecordsRefused(f"{self.name}: {why} ({counts}): {first}{rest}. {remedy}", self)

    def write_problems(self, directory: Path) -> Path | None:
        """Write all problems to a file in `directory`, one JSON object per line; None where there are none."""
        path = directory / PROBLEMS_FILE
        if not self.problems:
            path.unlink(missing_ok=True)  # of an earlier start with other records
            return None
        lines = (json.dumps(self._as_dict(problem), ensure_ascii=False) + "\n" for problem in self.problems)
        write_atomically(path, "".join(lines))
        return path

    def _as_dict(self, problem: RecordProblem) -> dict[str, Any]:
        source = self.sources[problem.source]
        return {**asdict(problem), "source": source.name, "unit": source.unit}

    def _title(self) -> str:
        return f"{self.name} ({self.sources[0].layout})" if len(self.sources) == 1 else self.name

    def _placed(self, problem: RecordProblem) -> str:
        """`line 3: ...`, with the name of the source where there are several."""
        source = self.sources[problem.source]
        name = f"{source.name}, " if len(self.sources) > 1 else ""
        return f"{name}{source.unit} {problem}"

    def _count(self, kinds: tuple[str, ...]) -> dict[str, int]:
        counts = Counter(problem.kind for problem in self.problems)
        return {kind: counts[kind] for kind in kinds}

    def _first(self, kinds: tuple[str, ...]) -> list[RecordProblem]:
        return [problem for problem in self.problems if problem.kind in kinds][:SHOWN]


class RecordsRefused(DollyError):
    """The records are not fit for training; `report` has all problems, where the message has the first ten."""

    def __init__(self, message: str = "", report: DataReport | None = None):
        super().__init__(message)
        self.report = report


def counted(counts: Mapping[str, int]) -> str:
    """`kind 3, other 1`, without those that are 0."""
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)
