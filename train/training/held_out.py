"""What the held-out loss decides: which checkpoint is the best one, and when training longer no longer helps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback

from train.config import TrainConfig
from train.training.checkpoints import MARKER, run_checkpoints, step_of


class HeldOutLosses:
    """The held-out loss by step, of a whole run: what earlier starts have measured is read from metrics.jsonl."""

    def __init__(self, rows: Iterable[dict] = ()):
        self.losses: dict[int, float] = {}
        for row in rows:
            self.add(row["step"], row["eval_loss"])

    def add(self, step: int, loss: float) -> None:
        self.losses[step] = loss if math.isfinite(loss) else math.inf

    def best(self, steps: Iterable[int] | None = None) -> int | None:
        """The step with the lowest loss, the earliest of several; among `steps` only, where they are given."""
        known = self.losses if steps is None else [step for step in steps if step in self.losses]
        return min(known, key=lambda step: (self.losses[step], step), default=None)

    @property
    def without_progress(self) -> int:
        """Evaluations since the lowest loss."""
        best = self.best()
        return 0 if best is None else sum(step > best for step in self.losses)


def keeps_best(config: TrainConfig) -> bool:
    """Whether a run keeps its best checkpoint beside the newest: where it may end behind it, or is exported from it."""
    return config.patience > 0 or config.final_from == "best"


def best_checkpoint(run: Path, losses: HeldOutLosses) -> Path | None:
    """The checkpoint in a run directory with the lowest held-out loss, of those saved where it was measured."""
    paths = {step_of(path): path for path in run_checkpoints(run) if (path / MARKER).is_file()}
    return paths.get(losses.best(paths))


class EarlyStopping(TrainerCallback):
    """Ends a run after `patience` evaluations in a row without a lower held-out loss; 0: never.

    Every checkpoint is evaluated where the best one is kept, or it could not be compared.
    """

    def __init__(self, config: TrainConfig, losses: HeldOutLosses):
        self.config, self.losses = config, losses
        self.reason: str | None = None

    def on_step_end(self, args, state, control, **keywords):
        if keeps_best(self.config) and control.should_save:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, **keywords):
        self.losses.add(state.global_step, metrics["eval_loss"])
        waited = self.losses.without_progress
        if self.config.patience and waited >= self.config.patience:
            best = self.losses.best()
            self.reason = (
                f"stopped early at step {state.global_step}: the held-out loss has not fallen below "
                f"{self.losses.losses[best]:.4f}, that of step {best}, for {waited} evaluations (patience)"
            )
            control.should_training_stop = True
