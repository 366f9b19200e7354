"""Checkpoints of a run: complete or ignored, the newest complete one chosen, older ones removed only then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelscope_dolly.errors import DollyError, SettingError
from train.training import checkpoints
from train.training.checkpoints import (
    MARKER,
    choose_resume,
    mark_complete,
    newest_complete,
    open_run_checkpoint,
    prune,
    run_checkpoints,
    writing,
)

ORDER = "order of the records"


def unmarked(run: Path, step: int) -> Path:
    """What a save leaves that was interrupted before its end."""
    path = run / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * 10)
    (path / "global_step" / "rank_0.pt").write_bytes(b"states" * step)
    return path


def saved(run: Path, step: int) -> Path:
    path = unmarked(run, step)
    mark_complete(path, 2, f"plan of step {step}", ORDER)
    return path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_marked_checkpoint_is_read_back(tmp_path):
    found = open_run_checkpoint(saved(tmp_path, 7))
    assert (found.path.name, found.step, found.world) == ("checkpoint-7", 7, 2)
    assert (found.plan_hash, found.order_hash) == ("plan of step 7", ORDER)
    listed = json.loads((found.path / MARKER).read_text())["files"]
    assert listed == {"model.safetensors": 70, "global_step/rank_0.pt": 42}


def test_the_marker_appears_whole_after_everything_else(tmp_path, monkeypatch):
    path = unmarked(tmp_path, 3)
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mark_complete(path, 1, "plan", ORDER)
    assert sorted(names(path.iterdir())) == ["global_step", "model.safetensors"]
    monkeypatch.undo()
    mark_complete(path, 1, "plan", ORDER)
    assert open_run_checkpoint(path).step == 3


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGES = {
    "unfinished": (lambda path: (path / MARKER).unlink(), "incomplete, complete.json is missing"),
    "file cut": (lambda path: cut(path / "global_step" / "rank_0.pt"), "rank_0.pt: 27 bytes, expected 54 bytes"),
    "file longer": (lambda path: (path / "model.safetensors").write_bytes(b"w" * 71), "71 bytes, expected 70 bytes"),
    "file gone": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: missing, expected 70 bytes"),
    "marker cut": (lambda path: cut(path / MARKER), "complete.json: not JSON"),
    "marker empty": (lambda path: (path / MARKER).write_text(""), "complete.json: not JSON"),
    "marker a list": (lambda path: (path / MARKER).write_text("[]"), "must hold a JSON object, found list"),
    "no facts": (lambda path: (path / MARKER).write_text('{"files": {}}'), "complete.json: damaged"),
    "files a list": (lambda path: (path / MARKER).write_text('{"files": [1]}'), "complete.json: damaged"),
    "marker a folder": (lambda path: ((path / MARKER).unlink(), (path / MARKER).mkdir()), "cannot be read"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason_and_the_one_before_is_taken(tmp_path, damage, says):
    saved(tmp_path, 6), damage(saved(tmp_path, 9))
    with pytest.raises(DollyError, match=says):
        open_run_checkpoint(tmp_path / "checkpoint-9")
    found, skipped = newest_complete(tmp_path)
    assert found.step == 6 and len(skipped) == 1
    assert "checkpoint-9" in skipped[0] and says in skipped[0]
    found, lines = choose_resume(tmp_path, "auto", ORDER)
    assert found.step == 6
    assert lines == [f"skipped: {skipped[0]}", f"resuming from {tmp_path / 'checkpoint-6'} at step 6"]


def test_newest_means_the_highest_step_and_other_names_are_left_alone(tmp_path):
    for step in (10, 9, 100):
        saved(tmp_path, step)
    (tmp_path / "checkpoint-500").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-700.old").mkdir()
    assert names(run_checkpoints(tmp_path)) == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert newest_complete(tmp_path)[0].step == 100


def test_a_new_run_starts_anew_and_says_so(tmp_path):
    assert choose_resume(tmp_path / "none", "auto", ORDER) == (
        None,
        ["starting from the base model: no complete checkpoint"],
    )
    assert choose_resume(tmp_path / "none", "no", ORDER) == (None, ["starting from the base model (resume: no)"])
    unmarked(tmp_path, 4)
    found, lines = choose_resume(tmp_path, "auto", ORDER)
    assert found is None and len(lines) == 2 and lines[0].startswith("skipped: ") and "checkpoint-4" in lines[0]


def test_resume_no_does_not_mix_with_checkpoints_that_are_there(tmp_path):
    saved(tmp_path, 2), unmarked(tmp_path, 4)
    with pytest.raises(SettingError, match="holds 2 checkpoints, the newest checkpoint-4; give another output_dir"):
        choose_resume(tmp_path, "no", ORDER)


def test_a_named_checkpoint_older_than_the_newest_is_taken_into_another_run_only(tmp_path):
    saved(tmp_path, 2), saved(tmp_path, 4)
    named = str(tmp_path / "checkpoint-2")
    with pytest.raises(SettingError, match=r"step 2, but .*checkpoint-4 is newer; remove the newer checkpoints, or"):
        choose_resume(tmp_path, named, ORDER)
    found, lines = choose_resume(tmp_path / "other", named, ORDER)
    assert found.step == 2 and lines == [f"resuming from {tmp_path / 'checkpoint-2'} at step 2"]
    (tmp_path / "checkpoint-4" / MARKER).unlink()  # incomplete ones do not count
    assert choose_resume(tmp_path, named, ORDER)[0].step == 2


@pytest.mark.parametrize("name", ["checkpoint-8", "final", "checkpoint-5"])
def test_a_named_checkpoint_must_be_a_complete_one(tmp_path, name):
    saved(tmp_path, 2), unmarked(tmp_path, 5)
    (tmp_path / "final").mkdir()
    with pytest.raises(DollyError, match=f"{name}: (not a checkpoint directory|incomplete)"):
        choose_resume(tmp_path, str(tmp_path / name), ORDER)


@pytest.mark.parametrize("named", [True, False])
def test_another_order_of_the_records_is_refused(tmp_path, named):
    path = saved(tmp_path, 2)
    with pytest.raises(SettingError, match=r"checkpoint-2: .*(data, seed, epochs, .* or another output_dir)"):
        choose_resume(tmp_path, str(path) if named else "auto", "another order")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest_complete_ones(tmp_path, keep):
    steps = (2, 4, 6, 8)
    for step in steps:
        saved(tmp_path, step)
    removed = prune(tmp_path, keep)
    assert names(run_checkpoints(tmp_path)) == [f"checkpoint-{step}" for step in steps[::-1][:keep]]
    assert names(removed) == [f"checkpoint-{step}" for step in steps[::-1][keep:]]
    assert prune(tmp_path, keep) == []


def test_pruning_counts_only_complete_ones_and_leaves_what_is_newer(tmp_path):
    for step in (2, 4, 8):
        saved(tmp_path, step)
    unmarked(tmp_path, 6), unmarked(tmp_path, 10), unmarked(tmp_path, 12)
    (tmp_path / "final").mkdir()
    assert names(prune(tmp_path, 2)) == ["checkpoint-6", "checkpoint-2"]
    assert names(run_checkpoints(tmp_path)) == [f"checkpoint-{step}" for step in (12, 10, 8, 4)]
    assert (tmp_path / "final").is_dir()


def test_pruning_removes_nothing_while_nothing_is_complete(tmp_path):
    unmarked(tmp_path, 2), unmarked(tmp_path, 4)
    assert prune(tmp_path, 1) == [] and len(run_checkpoints(tmp_path)) == 2


def test_a_removal_that_is_interrupted_leaves_no_complete_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 2), saved(tmp_path, 4)
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **keywords: None)
    prune(tmp_path, 1)
    with pytest.raises(DollyError, match="incomplete"):
        open_run_checkpoint(tmp_path / "checkpoint-2")


FULL = {
    "open": lambda: Path("/dev/full").write_text("x"),
    "torch": lambda: torch.save({"x": torch.zeros(9999)}, "/dev/full"),
    "safetensors": lambda: save_file({"x": torch.zeros(9)}, "/dev/null/x"),
}


@pytest.mark.parametrize("write", FULL.values(), ids=FULL)
def test_a_write_that_fails_is_told_in_one_line_with_what_is_free(tmp_path, monkeypatch, write):
    monkeypatch.setattr(checkpoints, "free_disk", lambda path: 12_340_000)
    with pytest.raises(DollyError) as error, writing(tmp_path / "checkpoint-2"):
        write()
    says = str(error.value)
    assert says.startswith(f"{tmp_path / 'checkpoint-2'} cannot be written (") and "0.01 GB are free" in says
    assert "\n" not in says and error.value.__cause__ is not None


def test_an_error_that_is_not_about_writing_stays_what_it_is(tmp_path):
    for lost in (RuntimeError("Connection closed by peer"), ValueError("x")):
        with pytest.raises(type(lost)) as error, writing(tmp_path):
            raise lost
        assert error.value is lost
