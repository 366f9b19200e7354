"""Runs that end before their last step, or go on elsewhere: patience, best checkpoint, time, disk, moving."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from modelscope_dolly.errors import SettingError
from tests.support.training_runs import STEPS, complete, finished, rows, write_recipe
from train.config import build
from train.training.callbacks import SaveAndStop
from train.training.checkpoints import (
    MARKER,
    Origin,
    mark_complete,
    newest_complete,
    open_run_checkpoint,
    prune,
    run_checkpoints,
)
from train.training.held_out import EarlyStopping, HeldOutLosses, best_checkpoint
from train.training.run_report import write_report
from train.training.spikes import spikes

GIVEN = {"model": "m", "dataset": "d", "output_dir": "o"}


def config(**changes):
    return build(GIVEN | changes).config


class Arguments:
    process_index, world_size, device = 0, 1, "cpu"


def state(step: int, last: int = 100) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


def test_the_best_step_is_the_earliest_with_the_lowest_loss():
    losses = HeldOutLosses({"step": step, "eval_loss": loss} for step, loss in ((2, 3.0), (4, 2.0), (6, 2.0)))
    losses.add(8, math.nan)
    assert (losses.best(), losses.best([2, 6, 8, 9]), losses.best([9])) == (4, 6, None)
    assert losses.without_progress == 2
    assert (HeldOutLosses().best(), HeldOutLosses().without_progress) == (None, 0)


def test_patience_counts_evaluations_without_a_lower_loss():
    early = EarlyStopping(config(patience=2), HeldOutLosses([{"step": 1, "eval_loss": 3.0}]))
    stopped = []
    for step, loss in ((2, 2.0), (3, 2.5), (4, 1.9), (5, 1.9), (6, 1.95)):
        control = TrainerControl()
        early.on_evaluate(Arguments, state(step), control, metrics={"eval_loss": loss})
        stopped.append(control.should_training_stop)
    assert stopped == [False, False, False, False, True]
    assert early.reason.startswith(
        "stopped early at step 6: the held-out loss has not fallen below 1.9000, that of step 4"
    )


def test_every_checkpoint_is_evaluated_where_the_best_is_kept():
    for changes, expected in (({}, False), ({"patience": 3}, True), ({"final_from": "best"}, True)):
        control = TrainerControl(should_save=True)
        EarlyStopping(config(**changes), HeldOutLosses()).on_step_end(Arguments, state(1), control)
        assert control.should_evaluate is expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patience": 1, "eval_every": 0}, "patience is 1, it must be left out where eval_every or test_size is 0"),
        ({"final_from": "best", "test_size": 0}, "final_from is 'best', it must be left out where"),
        ({"final_from": "newest"}, "final_from is 'newest', it must be one of last, best"),
        ({"lora": {"r": 4}, "zero_stage": "3"}, "zero_stage is '3', it must be 0, 1, 2 or auto: lora works with"),
        ({"lora": {"r": 4}, "offload": "all"}, "offload is 'all', it must be none, optimizer or auto: lora works"),
        ({"patience": -1}, "patience is -1, it must be at least 0"),
        ({"max_hours": -0.5}, "max_hours is -0.5, it must be at least 0 and at most 10,000"),
        ({"max_hours": "soon"}, "max_hours is 'soon', it must be a number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, says):
    with pytest.raises(SettingError) as caught:
        config(**changes)
    assert says in str(caught.value)


def test_the_best_checkpoint_outlives_newer_ones(tmp_path):
    for step in (3, 6, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()

    for path in run_checkpoints(tmp_path):
        mark_complete(path, 1, Origin())
    losses = HeldOutLosses({"step": step, "eval_loss": loss} for step, loss in ((2, 0.1), (3, 1.0), (6, 2.0), (9, 3.0)))
    assert best_checkpoint(tmp_path, losses) == tmp_path / "checkpoint-3"
    prune(tmp_path, 2, best_checkpoint(tmp_path, losses))
    assert [path.name for path in run_checkpoints(tmp_path)] == ["checkpoint-12", "checkpoint-9", "checkpoint-3"]
    (tmp_path / "checkpoint-3" / MARKER).unlink()
    assert best_checkpoint(tmp_path, losses) == tmp_path / "checkpoint-9"


def test_time_is_up_when_another_step_and_save_would_go_beyond_it(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("train.training.callbacks.time.monotonic", lambda: now[0])
    stopper = SaveAndStop(max_hours=0.01, begun=990.0, save_seconds=lambda: 3.0)  # until 1026
    try:
        stopper.on_train_begin(Arguments, state(0), TrainerControl())
        stopped = []
        for time in (1010.0, 1013.0, 1014.0):
            now[0] = time
            control = TrainerControl()
            stopper.on_step_end(Arguments, state(len(stopped) + 1), control)
            stopped.append(control.should_save and control.should_training_stop)
        assert stopped == [False, True, True]  # 1013 + the longest step of 10 + 3 = 1026
        control = TrainerControl()
        stopper.on_step_end(Arguments, state(100), control)
        assert not control.should_save  # the last step: there is nothing to go on with
    finally:
        stopper.on_train_end(Arguments, state(3), TrainerControl())


def test_a_run_that_learns_by_heart_ends_early_and_keeps_its_best(tmp_path):
    """Trained far too fast, it knows the records of training ever better and the others ever less."""
    settings = {"patience": 3, "final_from": "best", "learning_rate": 3e-2, "epochs": 12, "keep_checkpoints": 1}
    done = complete(write_recipe(tmp_path, **settings, eval_every=3))
    run = tmp_path / "run"
    evaluations = {row["step"]: row["eval_loss"] for row in rows(run) if "eval_loss" in row}
    best = min(evaluations, key=evaluations.get)
    last = max(evaluations)
    assert best < last < 4 * 12 and sum(step > best for step in evaluations) == 3
    assert f"stopped early at step {last}" in done.stdout() and f"weights of checkpoint-{best}" in done.stdout()
    kept = {path.name for path in run_checkpoints(run)}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{last}"}
    saved = load_file(run / f"checkpoint-{best}" / "model.safetensors")
    final = load_file(run / "final" / "model.safetensors")
    assert torch.equal(final["embed_out.weight"], saved["network.lm_head.weight"])
    assert json.loads((run / "run.json").read_text())["starts"][-1]["final"]["step"] == best
    report = (run / "report.md").read_text()
    assert f"stopped early at step {last}" in report and "## Steps that stand out" in report


def test_a_start_with_too_little_time_ends_complete_and_the_next_goes_on_where_the_run_was_moved(tmp_path):
    """max_hours of a second: a step is taken and saved. Moved, it goes on bit for bit."""
    recipe = write_recipe(tmp_path / "before", max_hours=1e-4)
    done = complete(recipe)
    run = tmp_path / "before" / "run"
    saved, _ = newest_complete(run)
    assert saved.step < STEPS and not (run / "final").exists()
    assert f"max_hours is 0.0001: ended with {saved.path}, complete; the same command goes on" in done.stdout()
    open_run_checkpoint(saved.path, verify=True)

    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    run.rename(moved)
    again = complete(recipe, "--output-dir", str(moved), "--max-hours", "0")
    assert f"resuming from {moved / saved.path.name} at step {saved.step}" in again.stdout()
    expected = finished()
    assert rows(moved) == rows(expected)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (moved, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not run.exists()


def fill_the_disk() -> None:
    """Less is free than the next checkpoint takes, but the check before a save sees enough."""
    from train.training import trainer

    trainer.free_disk = lambda path: 1000


def test_a_disk_that_fills_up_is_told_a_save_before(tmp_path):
    done = complete(write_recipe(tmp_path, epochs=2), before=fill_the_disk)
    lines = [line for line in done.stdout().splitlines() if line.startswith("the disk fills up")]
    assert len(lines) == 1, done.stdout()
    assert "0.00 GB free, and checkpoint-6 will need" in lines[0] and "before step 6, or the run ends there" in lines[0]


def test_jumps_of_loss_gradient_and_rate_stand_out():
    steady = [
        {"step": n, "loss": 2.0 + 0.01 * (n % 5), "grad_norm": 1.0, "lr": 1e-5 * min(n, 5) / 5} for n in range(1, 61)
    ]
    assert spikes(steady, warmup_steps=5) == []
    jumped = [dict(row) for row in steady]
    jumped[29]["loss"], jumped[39]["grad_norm"], jumped[44]["loss"] = 9.0, 50.0, math.nan
    for row in jumped[50:]:
        row["lr"] = 3e-5
    found = spikes(jumped, warmup_steps=5)
    assert [(spike.step, spike.name) for spike in found] == [(30, "loss"), (40, "grad_norm"), (45, "loss"), (51, "lr")]
    assert str(found[0]) == "step 30: loss 9, 2.02 in the steps before"
    falling = [{"step": n, "loss": 10.0 / n, "grad_norm": None, "lr": 1e-5 / n} for n in range(1, 50)]
    assert spikes(falling) == []


def test_the_report_lists_them(tmp_path):
    run = tmp_path / "a run"
    run.mkdir()
    losses = [2.0] * 20 + [9.0] + [2.0] * 3
    lines = [json.dumps({"step": n, "loss": loss, "tokens": 5, "seconds": 1.0}) for n, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = write_report(run, 0, ["why it ended"]).read_text()
    assert text.startswith("# a run\n") and "- why it ended\n" in text
    assert "- step 21: loss 9, 2 in the steps before\n" in text
    (run / "metrics.jsonl").write_text("\n".join(lines[:20]) + "\n")
    assert "None: no loss, gradient norm or learning rate that jumps." in Path(write_report(run, 0, [])).read_text()
