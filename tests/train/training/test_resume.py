"""A run that is killed, stopped or out of disk goes on with the same command as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.training_runs import (
    STEPS,
    Processes,
    as_earlier_versions_marked,
    complete,
    finished,
    needs_deepspeed,
    pause_at,
    rows,
    write_recipe,
)
from train.training.checkpoints import MARKER, newest_complete, open_run_checkpoint, run_checkpoints

alone = pytest.param(1, "auto", id="one process")
shared = [pytest.param(2, stage, id=f"two processes, ZeRO {stage}", marks=needs_deepspeed) for stage in ("2", "3")]
everywhere = pytest.mark.parametrize(("world", "zero_stage"), [alone, *shared])


def assert_as_if_uninterrupted(run: Path, world: int, zero_stage: str) -> None:
    """Every loss, gradient norm and rate, and every final weight, to the bit."""
    expected = finished(world, zero_stage)
    assert rows(run) == rows(expected)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, expected))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def resumed_at(run: Processes) -> int:
    """The step that a run said it goes on from; it must have begun there."""
    step = int(re.search(r"^resuming from \S+ at step (\d+)$", run.stdout(), re.MULTILINE)[1])
    starts = json.loads((run.folder / "run" / "run.json").read_text())["starts"]
    assert starts[-1]["resumed_from"].endswith(f"checkpoint-{step}")
    return step


@everywhere
def test_killed_at_any_step_it_goes_on_bit_for_bit(tmp_path, world, zero_stage):
    step = random.Random(f"{world} processes, ZeRO {zero_stage}").randint(4, 10)
    recipe = write_recipe(tmp_path, zero_stage=zero_stage)
    run = Processes(recipe, world=world, before=functools.partial(pause_at, step + 4))
    run.wait_for_step(step)
    run.kill()
    assert [rank.exitcode for rank in run.ranks] == [-signal.SIGKILL] * world
    newest = newest_complete(tmp_path / "run")[0].step
    assert 3 * ((step - 1) // 3) <= newest <= step + 4  # saved every 3 steps, each before the next step begins

    again = complete(recipe, world=world)
    assert resumed_at(again) == newest
    assert_as_if_uninterrupted(tmp_path / "run", world, zero_stage)


@everywhere
def test_a_truncated_checkpoint_is_skipped_for_the_one_before(tmp_path, world, zero_stage):
    shutil.copytree(finished(world, zero_stage), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    newest, before = run_checkpoints(tmp_path / "run")
    victim = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    cut(victim)

    again = complete(write_recipe(tmp_path, zero_stage=zero_stage), world=world)
    size = victim.stat().st_size
    assert f"skipped: {victim}: {size // 2} bytes, expected {size} bytes" in again.stdout()
    assert resumed_at(again) == open_run_checkpoint(before).step == STEPS - 1
    assert_as_if_uninterrupted(tmp_path / "run", world, zero_stage)
    assert newest_complete(tmp_path / "run")[0].path == newest


def kill_during_a_save(number: int) -> None:
    """After all files are written, before the marker is."""
    from train.training import trainer

    saves = []
    mark = trainer.mark_complete

    def mark_or_die(path, *facts):
        saves.append(path)
        if len(saves) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        mark(path, *facts)

    trainer.mark_complete = mark_or_die


def test_killed_during_a_save_it_goes_on_from_the_checkpoint_before(tmp_path):
    recipe = write_recipe(tmp_path)
    assert Processes(recipe, before=functools.partial(kill_during_a_save, 3)).wait() == [-signal.SIGKILL]
    assert [path.name for path in run_checkpoints(tmp_path / "run")] == [f"checkpoint-{step}" for step in (9, 6, 3)]

    again = complete(recipe)
    assert f"checkpoint-9: incomplete, {MARKER} is missing" in again.stdout() and resumed_at(again) == 6
    assert_as_if_uninterrupted(tmp_path / "run", 1, "auto")


def kill_during_the_export() -> None:
    from train import finetune

    finetune.export_model = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("world", "zero_stage"), [alone, shared[1]])
def test_killed_after_the_last_step_it_only_exports(tmp_path, world, zero_stage):
    recipe = write_recipe(tmp_path, zero_stage=zero_stage)
    assert -signal.SIGKILL in Processes(recipe, world=world, before=kill_during_the_export).wait()
    assert not (tmp_path / "run" / "final").exists()
    again = complete(recipe, world=world)
    assert resumed_at(again) == STEPS
    assert_as_if_uninterrupted(tmp_path / "run", world, zero_stage)


def test_a_checkpoint_that_is_saved_again_does_not_count_before_it_is_whole(tmp_path):
    """A damaged checkpoint has a marker, which its new files would fit one after the other."""
    shutil.copytree(finished(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    newest = run_checkpoints(tmp_path / "run")[0]
    cut(newest / "optimizer.pt")

    recipe = write_recipe(tmp_path)
    assert Processes(recipe, before=functools.partial(kill_during_a_save, 1)).wait() == [-signal.SIGKILL]
    assert (newest / "optimizer.pt").stat().st_size == (finished() / newest.name / "optimizer.pt").stat().st_size
    assert newest_complete(tmp_path / "run")[0].path != newest
    complete(recipe)
    assert_as_if_uninterrupted(tmp_path / "run", 1, "auto")


@pytest.mark.parametrize(("world", "zero_stage"), [alone, shared[0]])
def test_sigterm_ends_the_step_saves_and_says_how_to_go_on(tmp_path, world, zero_stage):
    recipe = write_recipe(tmp_path, zero_stage=zero_stage)
    run = Processes(recipe, world=world, before=functools.partial(pause_at, 8))
    run.wait_for_step(4)
    run.ranks[-1].terminate()  # of several processes to one alone: the others must stop with it
    assert run.wait() == [2] * world
    told = [line for line in run.stderr().splitlines() if line.startswith("train.finetune: ")]
    (step,) = re.fullmatch(r"train.finetune: stopped by SIGTERM at step (\d+); .*", *told).groups()
    assert newest_complete(tmp_path / "run")[0].step == rows(tmp_path / "run")[-1]["step"] == int(step) < STEPS
    assert not (tmp_path / "run" / "final").exists() and "Traceback" not in run.stderr()

    again = complete(recipe, world=world)
    assert resumed_at(again) == int(step)
    assert_as_if_uninterrupted(tmp_path / "run", world, zero_stage)


def forget_to_check_the_disk() -> None:
    from train import finetune
    from train.training import trainer

    finetune.check_disk = trainer.check_disk = lambda *arguments: None


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes."""
    mounted = []

    def mount(place: Path, size: int) -> None:
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system is not permitted here")
        mounted.append(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


# In the middle of the weights, and of the optimizer's states: safetensors and torch fail each in their own way.
@pytest.mark.parametrize(
    ("share", "world", "zero_stage"),
    [
        pytest.param(0.2, 1, "auto", id="weights, one process"),
        pytest.param(0.6, 1, "auto", id="states, one process"),
        pytest.param(0.6, 2, "3", id="states, two processes", marks=needs_deepspeed),
    ],
)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path, small_disk, share, world, zero_stage):
    first = finished(world, zero_stage) / f"checkpoint-{STEPS}"
    pages = [-(-file.stat().st_size // 4096) * 4096 for file in first.rglob("*") if file.is_file()]
    run = tmp_path / "run"
    small_disk(run, int(sum(pages) * (1 + share)) + 32 * 4096)
    recipe = write_recipe(tmp_path, zero_stage=zero_stage)

    full = Processes(recipe, world=world, before=forget_to_check_the_disk)
    codes = full.wait()
    told = [line for rank in range(world) for line in full.stderr(rank).splitlines() if "train.finetune: " in line]
    told = [line for line in told if not line.endswith("another process of this run ended; its message says why")]
    assert set(codes) == {2} and len(told) >= 1
    pattern = r"train.finetune: (\S+) cannot be written \(.+\); 0.00 GB are free there. Started again, .*"
    assert all(re.fullmatch(pattern, line)[1] == str(run / "checkpoint-6") for line in told)
    assert all("Traceback" not in full.stderr(rank) for rank in range(world))
    assert newest_complete(run)[0].step == 3

    subprocess.run(["mount", "-o", "remount,size=64m", str(run)], check=True)
    again = complete(recipe, world=world)
    assert resumed_at(again) == 3
    assert_as_if_uninterrupted(run, world, zero_stage)


def test_too_little_disk_is_told_before_anything_is_written(tmp_path, small_disk):
    small_disk(tmp_path / "disk", 1_000_000)
    run = Processes(write_recipe(tmp_path), "--output-dir", str(tmp_path / "disk" / "run"))
    assert run.wait() == [2]
    assert re.search(
        r"^train.finetune: \S+: the run needs \d+.\d\d GB of disk, 0.00 GB are free; free some", run.stderr()
    )
    assert list((tmp_path / "disk").iterdir()) == []


def test_what_cannot_be_split_for_more_processes_is_refused(tmp_path):
    shutil.copytree(finished(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    before = sorted((tmp_path / "run").rglob("*"))
    run = Processes(write_recipe(tmp_path), world=2)
    assert run.wait() == [2, 2]
    assert f"checkpoint-{STEPS} was saved by one process without DeepSpeed and cannot be split" in run.stderr()
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_other_records_are_refused_and_a_new_directory_starts_anew(tmp_path):
    shutil.copytree(finished(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    recipe = write_recipe(tmp_path, seed=43)
    run = Processes(recipe)
    assert run.wait() == [2]
    assert f"checkpoint-{STEPS}: was made with other records or another order of them" in run.stderr()
    other = complete(recipe, "--output-dir", str(tmp_path / "other"))
    assert "starting from the base model" in other.stdout()
    assert rows(tmp_path / "other")[0]["loss"] != rows(finished())[0]["loss"]


# Two runs at once, and checkpoints of other settings


def test_a_second_run_in_the_same_directory_is_refused_and_the_first_goes_on(tmp_path):
    recipe = write_recipe(tmp_path)
    first = Processes(recipe, before=functools.partial(pause_at, 8))
    first.wait_for_step(8)
    before = sorted((tmp_path / "run").rglob("*"))
    (tmp_path / "second").mkdir()
    shutil.copy(recipe, tmp_path / "second")
    second = Processes(tmp_path / "second" / recipe.name, "--learning-rate", "1e-2")
    assert second.wait() == [2]
    told = second.stderr().splitlines()[-1]
    assert told.startswith(
        f"train.finetune: {tmp_path / 'run'}: another run is at work here: process {first.ranks[0].pid}"
    )
    assert sorted((tmp_path / "run").rglob("*")) == before
    first.ranks[0].kill()
    first.wait()

    again = complete(recipe)
    assert f"left by process {first.ranks[0].pid} on " in again.stdout() and resumed_at(again) == 6
    assert_as_if_uninterrupted(tmp_path / "run", 1, "auto")
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_run_whose_lock_was_taken_over_stops_before_it_writes(tmp_path):
    """As one that was suspended for minutes on another machine."""
    run = Processes(write_recipe(tmp_path), before=functools.partial(pause_at, 8))
    run.wait_for_step(8)
    lock = tmp_path / "run" / "run.lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "far", "token": "another"}).ljust(511) + "\n")
    before = sorted((tmp_path / "run").rglob("*"))
    run.ranks[0].terminate()
    assert run.wait() == [2]
    assert f"run.lock: taken over by process {run.ranks[0].pid} on far" in run.stderr().splitlines()[-1]
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_checkpoint_of_other_settings_is_refused_unless_it_is_named(tmp_path):
    recipe = write_recipe(tmp_path)
    run = Processes(recipe, "--learning-rate", "1e-2", before=functools.partial(pause_at, 8))
    run.wait_for_step(8)
    run.kill()
    before = sorted((tmp_path / "run").rglob("*"))
    refused = Processes(recipe, "--epochs", "4")
    assert refused.wait() == [2]
    told = refused.stderr().splitlines()[-1]
    path = tmp_path / "run" / "checkpoint-6"
    assert f"{path}: was saved with other settings, which change the result: learning_rate was 0.01, is 0.001." in told
    assert sorted((tmp_path / "run").rglob("*")) == [path for path in before if path.name != "run.lock"]

    again = complete(recipe, "--resume", str(path))
    assert "changed, and with it the result: learning_rate was 0.01, is 0.001" in again.stdout()
    rates = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row]
    assert len(rates) == STEPS and rates[5] > 5e-3


# Damage that leaves the size


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
                                  "trainer_state.json", "training_args.bin", MARKER])  # fmt: skip
def test_a_checkpoint_whose_content_changed_is_skipped_for_the_one_before(tmp_path, name):
    shutil.copytree(finished(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    newest, before = run_checkpoints(tmp_path / "run")
    victim = newest / name
    data = bytearray(victim.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
    victim.write_bytes(data)

    again = complete(write_recipe(tmp_path))
    assert f"skipped: {victim}: " in again.stdout() and resumed_at(again) == open_run_checkpoint(before).step
    assert_as_if_uninterrupted(tmp_path / "run", 1, "auto")
    assert open_run_checkpoint(newest, verify=True).path == newest  # saved anew


@needs_deepspeed
def test_damage_to_the_states_of_any_process_is_found_by_all(tmp_path):
    shutil.copytree(finished(2, "2"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    newest, before = run_checkpoints(tmp_path / "run")
    victim = sorted(newest.rglob("*_optim_states.pt"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.write_bytes(data)
    again = complete(write_recipe(tmp_path, zero_stage="2"), world=2)
    assert f"skipped: {victim}: sha256 " in again.stdout() and resumed_at(again) == open_run_checkpoint(before).step
    assert_as_if_uninterrupted(tmp_path / "run", 2, "2")


def test_a_checkpoint_of_an_earlier_version_is_resumed_with_a_word(tmp_path):
    shutil.copytree(finished(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    newest, before = run_checkpoints(tmp_path / "run")
    shutil.rmtree(newest)
    as_earlier_versions_marked(before)
    again = complete(write_recipe(tmp_path))
    assert f"{before} is of an earlier version, without digests" in again.stdout()
    assert resumed_at(again) == open_run_checkpoint(before).step
    assert_as_if_uninterrupted(tmp_path / "run", 1, "auto")


# The records of a run


DAMAGED = {
    "run.json empty": ("run.json", lambda data: b"{}", "`starts` must be a list"),
    "run.json cut": ("run.json", lambda data: data[: len(data) // 2], "not JSON"),
    "metrics bad byte": (
        "metrics.jsonl",
        lambda data: data.replace(b"loss", b"lo\xffs", 1),
        "metrics.jsonl:1: not JSON",
    ),
    "metrics a number": ("metrics.jsonl", lambda data: b"5\n" + data, "metrics.jsonl:1: must be a JSON object"),
    "metrics no step": ("metrics.jsonl", lambda data: b'{"loss": 1}\n' + data, "`step` must be a whole number"),
}


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_one_line_and_without_it_the_run_resumes(tmp_path, name, damage, says):
    shutil.copytree(finished(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    record = tmp_path / "run" / name
    record.write_bytes(damaged := damage(record.read_bytes()))
    recipe = write_recipe(tmp_path)
    run = Processes(recipe)
    assert run.wait() == [2]
    told = run.stderr().splitlines()[-1]
    assert told.startswith(f"train.finetune: {record}") and says in told and "move it out of the run directory" in told
    assert "Traceback" not in run.stderr() and record.read_bytes() == damaged

    record.rename(tmp_path / name)
    complete(recipe)
    assert torch.equal(*(load_file(folder / "final" / "model.safetensors")["gpt_neox.embed_in.weight"]
                         for folder in (tmp_path / "run", finished())))  # fmt: skip


# Killed in the export or after it


def pause_in_the_export(folder: Path) -> None:
    """After the weights are written, before the directory gets its name."""
    from modelscope_dolly.checkpoint import writer

    def wait(directory):
        (folder / "exporting").touch()
        signal.pause()

    writer.seal_directory = wait


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_in_the_export_leaves_nothing_for_long(tmp_path, number):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    first = Processes(recipe, before=functools.partial(pause_in_the_export, tmp_path))
    while not (tmp_path / "exporting").exists():
        first.ranks[0].join(0.01)
        assert first.ranks[0].is_alive(), first.stderr()
    leftovers = list(run.glob(".final.*.incomplete"))
    assert [(path / "model.safetensors").exists() for path in leftovers] == [True]
    os.kill(first.ranks[0].pid, number)
    assert first.wait() == [-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM]
    if number == signal.SIGTERM:
        assert list(run.glob(".*")) == [] and not (run / "run.lock").exists()
        assert first.stderr().splitlines()[-1] == "stopped by SIGTERM; the same command goes on from here"

    again = complete(recipe)
    assert (f"removed {leftovers[0]}, left by" in again.stdout()) == (number == signal.SIGKILL)
    assert list(run.glob(".*")) == [] and resumed_at(again) == STEPS
    assert_as_if_uninterrupted(run, 1, "auto")


def kill_after_the_export() -> None:
    from train import finetune

    export = finetune.export_model

    def export_and_die(*arguments):
        export(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    finetune.export_model = export_and_die


def test_killed_after_the_export_the_same_command_does_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (it is in the extra `train`)")
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    assert Processes(recipe, before=kill_after_the_export).wait() == [-signal.SIGKILL]
    assert (run / "final" / "manifest.json").exists() and (run / "loss.png").exists()
    (run / "loss.png").unlink()  # as versions did that drew it last

    other = Processes(recipe, "--learning-rate", "1e-2")
    assert other.wait() == [2] and "It had other settings: learning_rate was 0.001, is 0.01" in other.stderr()
    again = complete(recipe)
    assert f"drew {run / 'loss.png'}, which was missing" in again.stdout() and f"{STEPS} steps" in again.stdout()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert_as_if_uninterrupted(run, 1, "auto")
    last = Processes(recipe)
    assert last.wait() == [2] and "this run is finished" in last.stderr()


def publish_to_a_list(folder: Path) -> None:
    from train import finetune

    finetune.before_training = lambda values: None
    finetune.after_training = lambda values, directory: (folder / "published").write_text(str(directory))


def test_killed_before_publishing_the_same_command_publishes(tmp_path):
    shutil.copytree(finished(), tmp_path / "run")
    recipe = write_recipe(tmp_path, publish={"model_id": "me/x", "revision": "v1.0.0"})
    run = complete(recipe, before=functools.partial(publish_to_a_list, tmp_path))
    assert (tmp_path / "published").read_text() == str(tmp_path / "run" / "final")
    assert "has been trained and exported already" in run.stdout()


def test_a_damaged_final_is_not_published(tmp_path):
    shutil.copytree(finished(), tmp_path / "run")
    weights = tmp_path / "run" / "final" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0xFF
    weights.write_bytes(data)
    recipe = write_recipe(tmp_path, publish={"model_id": "me/x", "revision": "v1.0.0"})
    run = Processes(recipe, before=functools.partial(publish_to_a_list, tmp_path))
    assert run.wait() == [2] and not (tmp_path / "published").exists()
    assert "final has problems" in run.stderr() and "Remove it, and the same command exports it again" in run.stderr()
