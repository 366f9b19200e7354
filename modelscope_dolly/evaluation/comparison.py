"""Rows of the results table, measured and published, their difference, and the check against the card.

Imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelscope_dolly.errors import SettingError, unknown_name
from modelscope_dolly.evaluation import published as card
from modelscope_dolly.evaluation import store
from modelscope_dolly.evaluation.published import CORRECT, TASK_NAMES, TASKS

#: A model reproduces its row if it is within these: points of each task, and the difference of the gmeans. The same
#: weights measured elsewhere differ by up to 1.4 points and 0.006 (docs/evaluation.md).
POINTS, GMEAN = 1.5, 0.007


@dataclass(frozen=True)
class ResultRow:
    """One line of the results table."""

    name: str  # of the model, with its revision
    counts: dict[str, tuple[int, int]]  # task -> (correct answers, documents), by the card's metric; only tasks run
    published: bool  # whether it is the card's
    obstacles: tuple[str, ...] = ()  # why it must not be compared with the card; empty when it may
    detail: str = ""  # settings that tell this row from others of the same model

    @property
    def scores(self) -> dict[str, float]:
        return {task: correct / size for task, (correct, size) in self.counts.items()}

    @property
    def errors(self) -> dict[str, float | None]:
        """Standard error of each score."""
        return {task: card.standard_error(correct / size, size) for task, (correct, size) in self.counts.items()}

    @property
    def gmean(self) -> float | None:
        return card.gmean(list(self.scores.values()))

    @property
    def gmean_error(self) -> float | None:
        return card.gmean_error(list(self.scores.values()), list(self.errors.values()))

    @property
    def label(self) -> str:
        if self.published:
            return f"{self.name} (card)"
        return f"{self.name} (NOT comparable: {'; '.join(self.obstacles)})" if self.obstacles else self.name


def published_rows() -> list[ResultRow]:
    """The nine rows of the card, in its order."""
    return [
        ResultRow(name, {task.name: (count, task.size) for task, count in zip(TASKS, counts, strict=True)}, True)
        for name, counts in CORRECT.items()
    ]


def measured_row(results: Sequence[store.TaskResult]) -> ResultRow:
    """The row of one run's tasks, given in any order."""
    run = results[0].run
    counts = {result.task: (result.card_correct, result.size) for result in results}
    detail = (
        f"{run.dtype} on {run.device}, log-probabilities in {run.softmax_dtype}, batch size {run.batch_size}, scorer "
        f"{run.scorer}, lm-eval {run.versions['lm_eval']}, files sha256 {run.files_sha256[:12]}"
    )
    return ResultRow(
        f"{run.model}@{run.revision}" if run.revision else run.model,
        {name: counts[name] for name in TASK_NAMES if name in counts},
        published=False,
        obstacles=tuple(dict.fromkeys(obstacle for result in results for obstacle in result.obstacles)),
        detail=detail,
    )


def with_published(measured: Sequence[ResultRow]) -> list[ResultRow]:
    """All rows by gmean, smallest first, as on the card; rows without one come first."""
    return sorted([*published_rows(), *measured], key=lambda row: (row.gmean or 0.0, not row.published))


@dataclass(frozen=True)
class Difference:
    """Measured minus published, for one task: in documents, and in standard errors of the published score."""

    items: int
    errors: float


def differences(row: ResultRow, reference: ResultRow) -> dict[str, Difference]:
    """Of each task that was run on all of its documents."""
    result = {}
    for task, (correct, size) in row.counts.items():
        published, full_size = reference.counts[task]
        if size == full_size:
            items = correct - published
            result[task] = Difference(items, items / size / reference.errors[task])
    return result


def reference_row(name: str | None, model: str) -> ResultRow | None:
    """The published row called `name`, or that of the model if its name has one.

    Raises:
        SettingError: `name` is no row of the card.
    """
    if name is not None and name not in CORRECT:
        raise SettingError(unknown_name("row of the card", name, CORRECT))
    wanted = name or card.published_name(model)
    return next((row for row in published_rows() if row.name == wanted), None)


def check_can_pass(model: str, reference: ResultRow | None, limit: int | None, template: str) -> None:
    """Refuse a check against the card that no model could pass. Raises SettingError."""
    if limit is not None or template != "none":
        option = "--limit" if limit is not None else f"--template {template}"
        raise SettingError(
            f"--check-against card with {option}: such results are not comparable with the card; leave one out"
        )
    if reference is None:
        raise SettingError(f"{model}: the card has no row of that name; name one with --row: {', '.join(CORRECT)}")


def failures(row: ResultRow, reference: ResultRow) -> list[str]:
    """Why a row does not reproduce the published one; empty when it does."""
    if row.obstacles:
        return [f"not comparable: {obstacle}" for obstacle in row.obstacles]
    if missing := [f"{name}: not run" for name in TASK_NAMES if name not in row.counts]:
        return missing
    reasons = []
    for name in TASK_NAMES:
        points = 100 * (row.scores[name] - reference.scores[name])
        if abs(points) > POINTS:
            reasons.append(f"{name}: {points:+.2f} points from the card's, {POINTS} are allowed")
    if row.gmean is None or abs(row.gmean - reference.gmean) > GMEAN:
        value = "n/a" if row.gmean is None else f"{row.gmean:.6g}"
        reasons.append(f"gmean: {value}, the card's is {reference.gmean:.6g}, {GMEAN} are allowed")
    return reasons
