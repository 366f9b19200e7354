"""Rows of the table: what was measured beside what was published, their difference, and the check against the card.

Imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelscope_dolly.errors import SettingError, unknown_name
from modelscope_dolly.evaluation import store
from modelscope_dolly.evaluation.published import NAMES, ROWS, TASKS, gmean, gmean_error, row_of, standard_error

#: A model reproduces its row if it is within these: points of each task, and the difference of the gmeans. The same
#: weights measured elsewhere differ by up to 1.4 points and 0.006 (docs/evaluation.md).
POINTS, GMEAN = 1.5, 0.007


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the model, with its revision.
        counts: task -> (right answers, documents), by the card's metric; only tasks that were run.
        published: whether it is the card's.
        obstacles: why it must not be compared with the card; empty when it may.
        detail: settings that tell this row from others of the same model.
    """

    name: str
    counts: dict[str, tuple[int, int]]
    published: bool
    obstacles: tuple[str, ...] = ()
    detail: str = ""

    @property
    def scores(self) -> dict[str, float]:
        return {name: right / size for name, (right, size) in self.counts.items()}

    @property
    def errors(self) -> dict[str, float | None]:
        """Standard error of each score."""
        return {name: standard_error(right / size, size) for name, (right, size) in self.counts.items()}

    @property
    def gmean(self) -> float | None:
        return gmean(list(self.scores.values()))

    @property
    def gmean_error(self) -> float | None:
        return gmean_error(list(self.scores.values()), list(self.errors.values()))

    @property
    def label(self) -> str:
        if self.published:
            return f"{self.name} (card)"
        return f"{self.name} (NOT comparable: {'; '.join(self.obstacles)})" if self.obstacles else self.name


def published_rows() -> list[Row]:
    """The nine rows of the card, in its order."""
    sizes = [task.size for task in TASKS]
    return [
        Row(name, dict(zip(NAMES, zip(counts, sizes, strict=True), strict=True)), published=True)
        for name, counts in ROWS.items()
    ]


def measured_rows(output: Path) -> list[Row]:
    """One row per run below the output directory."""
    return [row_from(list(found.values())) for found in store.runs(output)]


def row_from(results: Sequence[store.TaskResult]) -> Row:
    """The row of one run's tasks."""
    run = results[0].run
    counts = {result.task: (result.right, result.size) for result in results}
    obstacles = tuple(dict.fromkeys(obstacle for result in results for obstacle in result.obstacles))
    ordered = {name: counts[name] for name in NAMES if name in counts}
    name = f"{run.model}@{run.revision}" if run.revision else run.model
    detail = (
        f"{run.dtype} on {run.device}, log-probabilities in {run.softmax_dtype}, batch size {run.batch_size}, scorer "
        f"{run.scorer}, lm-eval {run.versions['lm_eval']}, files sha256 {run.files_sha256[:12]}"
    )
    return Row(name, ordered, published=False, obstacles=obstacles, detail=detail)


def table_rows(measured: Sequence[Row]) -> list[Row]:
    """With the published rows, by gmean, smallest first, as on the card; rows without one come first."""
    return sorted([*published_rows(), *measured], key=lambda row: (row.gmean or 0.0, not row.published))


@dataclass(frozen=True)
class Difference:
    """Measured minus published, for one task: in documents, and in standard errors of the published score."""

    items: int
    errors: float


def differences(row: Row, reference: Row) -> dict[str, Difference]:
    """Of each task that was run whole."""
    found = {}
    for name, (right, size) in row.counts.items():
        published, full = reference.counts[name]
        if size == full:
            error = standard_error(published / full, full)
            found[name] = Difference(right - published, (right - published) / full / error)
    return found


def reference_row(name: str | None, model: str) -> Row | None:
    """The published row called `name`, or that of the model if its name has one.

    Raises:
        SettingError: `name` is no row of the card.
    """
    if name is not None and name not in ROWS:
        raise SettingError(unknown_name("row of the card", name, ROWS))
    found = name or row_of(model)
    return next((row for row in published_rows() if row.name == found), None)


def check_can_pass(model: str, reference: Row | None, limit: int | None, template: str) -> None:
    """Refuse a check against the card that no model could pass. Raises SettingError."""
    if limit is not None or template != "none":
        what = "--limit" if limit is not None else f"--template {template}"
        raise SettingError(
            f"--check-against card with {what}: such results are not comparable with the card; leave one out"
        )
    if reference is None:
        raise SettingError(f"{model}: the card has no row of that name; name one with --row: {', '.join(ROWS)}")


def failures(row: Row, reference: Row) -> list[str]:
    """Why a row does not reproduce the published one; empty when it does."""
    if row.obstacles:
        return [f"not comparable: {obstacle}" for obstacle in row.obstacles]
    missing = [name for name in NAMES if name not in row.counts]
    if missing:
        return [f"{name}: not run" for name in missing]
    found = []
    for name in NAMES:
        points = 100 * (row.scores[name] - reference.scores[name])
        if not abs(points) <= POINTS:
            found.append(f"{name}: {points:+.2f} points from the card's, {POINTS} are allowed")
    if row.gmean is None or not abs(row.gmean - reference.gmean) <= GMEAN:
        value = "n/a" if row.gmean is None else f"{row.gmean:.6g}"
        found.append(f"gmean: {value}, the card's is {reference.gmean:.6g}, {GMEAN} are allowed")
    return found
