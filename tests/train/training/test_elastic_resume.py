"""Going on from a checkpoint on another number of processes: the same records, the same losses, the same next step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from modelscope_dolly.errors import DollyError, SettingError
from tests.support.training_runs import STEPS, Processes, complete, needs_deepspeed, rows, write_recipe
from train.training.checkpoints import MARKER, open_run_checkpoint
from train.training.elastic_resume import SUFFIX, convert, starting_point

EVERY = 4  # optimizer steps between checkpoints
TOLERANCE = 1e-5  # of a loss

pytestmark = needs_deepspeed


def recipe_of(folder: Path, **changes) -> Path:
    return write_recipe(folder, save_every=EVERY, keep_checkpoints=STEPS, **changes)


def cut_copy(run: Path, step: int, **changes) -> Path:
    """The recipe of a run that goes on from checkpoint `step` of `run`, in a folder beside it."""
    folder = run.parent.with_name(f"{run.parent.name}-{step}")
    recipe = recipe_of(folder, **changes)
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("final", "metrics.jsonl"))
    for path in (folder / "run").glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    return recipe


def losses(run: Path, after: int) -> dict[tuple[int, str], float]:
    return {
        (row["step"], name): row[name]
        for row in rows(run)
        for name in ("loss", "eval_loss")
        if name in row and row["step"] > after
    }


def last_start(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["starts"][-1]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    """A run of one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("plain") / "whole"
    complete(recipe_of(folder, epochs=1))
    return folder / "run"


@pytest.fixture(scope="module")
def split_run(tmp_path_factory) -> Path:
    """A run of two processes with ZeRO 2."""
    folder = tmp_path_factory.mktemp("split") / "whole"
    complete(recipe_of(folder, zero_stage="2"), world=2)
    return folder / "run"


@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_two_processes_then_one_then_two_lose_what_an_uninterrupted_run_loses(tmp_path, split_run, stage):
    whole = split_run
    if stage != "2":
        complete(recipe_of(tmp_path / "whole", zero_stage=stage), world=2)
        whole = tmp_path / "whole" / "run"

    alone = cut_copy(whole, EVERY, zero_stage=stage)
    complete(alone, world=1)
    run = alone.parent / "run"
    assert losses(run, 0) == pytest.approx(losses(whole, EVERY), abs=TOLERANCE)
    # Not the same passes: otherwise nothing of this would have been put to the test.
    first, second = last_start(whole)["plan"], last_start(run)["plan"]
    assert (first["world"], second["world"]) == (2, 1)
    assert second["accumulation"] > first["accumulation"]
    assert second["plan_hash"] != first["plan_hash"] and second["order_hash"] == first["order_hash"]
    assert list(run.glob(f"*{SUFFIX}*")) == [], "the converted checkpoint is of no more use and as large as one"

    again = cut_copy(run, 2 * EVERY, zero_stage=stage)
    complete(again, world=2)
    assert last_start(again.parent / "run")["resumed_from"].endswith(f"checkpoint-{2 * EVERY}")
    assert losses(again.parent / "run", 0) == pytest.approx(losses(whole, 2 * EVERY), abs=TOLERANCE)


def test_one_process_without_a_stage_goes_on_with_deepspeed_and_says_so(split_run):
    recipe = cut_copy(split_run, STEPS - EVERY)
    done = complete(recipe, world=1)
    assert losses(recipe.parent / "run", 0) == pytest.approx(losses(split_run, STEPS - EVERY), abs=TOLERANCE)
    assert "was saved by DeepSpeed, so DeepSpeed is used here too, on one process" in done.stdout()
    assert "ZeRO 2 instead of 0" in done.stdout()


def test_a_checkpoint_of_one_process_without_deepspeed_cannot_be_split(plain_run):
    recipe = cut_copy(plain_run, EVERY - 1, epochs=1)
    checkpoint = plain_run / f"checkpoint-{EVERY}"
    processes = Processes(recipe, "--zero-stage", "2", "--resume", str(checkpoint), world=2)
    assert processes.wait() == [2, 2]
    assert processes.stderr().splitlines()[-1] == (
        f"train.finetune: {checkpoint} was saved by one process without DeepSpeed and cannot be split: resume with one "
        "process and zero_stage 0, or give another output_dir"
    )
    assert not (recipe.parent / "run" / f"checkpoint-{EVERY}").exists()


def test_what_fits_is_resumed_as_it_is(plain_run, split_run):
    plain, split = (open_run_checkpoint(run / f"checkpoint-{EVERY}") for run in (plain_run, split_run))
    assert starting_point(None, 2, 3, True).path is None
    for saved, world, stage, deepspeed in ((plain, 1, 0, False), (split, 2, 2, True), (split, 2, 1, True)):
        start = starting_point(saved, world, stage, deepspeed)
        assert (start.path, start.stage, start.use_deepspeed) == (saved.path, stage, deepspeed)
        assert start.convert is None and not start.lines and not start.deepspeed_settings


def test_another_way_of_splitting_is_refused_unless_the_stage_is_auto_to_raise(split_run):
    split = open_run_checkpoint(split_run / f"checkpoint-{EVERY}")
    start = starting_point(split, 2, 0, True, stage_is_auto=True)
    assert (start.stage, start.convert) == (2, None)
    for stage, ours in ((0, False), (3, True), (3, False)):
        with pytest.raises(SettingError, match=f"ZeRO 1 or 2 and this run has {stage}: give zero_stage 1 or 2"):
            starting_point(split, 2, stage, True, stage_is_auto=ours)


def test_a_conversion_is_complete_or_absent_and_made_anew(tmp_path, split_run):
    checkpoint = tmp_path / f"checkpoint-{EVERY}"
    target = checkpoint.with_name(checkpoint.name + SUFFIX)
    shutil.copytree(split_run / checkpoint.name, checkpoint)
    left_over = tmp_path / f".{target.name}.1.00000000.incomplete"
    left_over.mkdir()

    convert(checkpoint, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((checkpoint.name, target.name))
    (target / MARKER).write_text("as a start left it that was killed")
    convert(checkpoint, target)
    assert (target / MARKER).read_bytes() == (checkpoint / MARKER).read_bytes()

    # A checkpoint that was saved anew, and is damaged besides.
    (checkpoint / MARKER).touch()
    next(checkpoint.rglob("*_optim_states.pt")).write_bytes(b"no longer a tensor")
    with pytest.raises(DollyError, match="ds_to_universal failed") as error:
        convert(checkpoint, target)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
