"""The recipe from end to end: the same losses however it is started, and one line for every mistake."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modelscope_dolly import dolly_pipeline
from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.prompt import CONTROL_KEYS
from tests.support.training_runs import (
    HELD_OUT,
    RECORDS,
    STEPS,
    Processes,
    complete,
    finished,
    free_port,
    launch,
    material,
    needs_deepspeed,
    rows,
    write_recipe,
)
from train import finetune, prepare
from train.bench import padded
from train.data.data_report import PROBLEMS_FILE
from train.finetune import main
from train.training.checkpoints import writing


def close(run: Path, to: Path, tolerance: float) -> None:
    """Losses of both runs at every step, and gradient norms, within a relative tolerance."""
    compared = 0
    for ours, theirs in zip(rows(run), rows(to), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for name in ours.keys() & {"loss", "eval_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), f"{name} of step {ours['step']}"
            compared += 1
    assert compared == STEPS + STEPS // 4


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def same_weights(run: Path, to: Path) -> None:
    """Final weights differ by far less than training has changed them."""
    ours, theirs, base = weights(run), weights(to), load_file(material() / "base" / "model.safetensors")
    assert ours.keys() == theirs.keys() == base.keys()
    distance = math.sqrt(sum((ours[name] - theirs[name]).square().sum() for name in ours))
    assert distance < 1e-3 * math.sqrt(sum((theirs[name] - base[name]).square().sum() for name in ours))


# One process


def test_the_result_is_sound_and_answers(records):
    run = finished()
    findings = check_directory(run / "final")
    assert len(findings) >= 6 and {finding.status for finding in findings} == {"ok"}
    answer = dolly_pipeline(str(run / "final"), device="cpu")("Name three colours.", max_new_tokens=8, seed=1)
    assert isinstance(answer["text"], str) and not any(key in answer["text"] for key in CONTROL_KEYS)
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["use_cache"] is True and config["torch_dtype"] == config["dtype"] == "float32"


def test_training_learns():
    training = [row["loss"] for row in rows(finished()) if "loss" in row]
    held_out = [row["eval_loss"] for row in rows(finished()) if "eval_loss" in row]
    assert training[-1] < training[0] - 0.1 and held_out == sorted(held_out, reverse=True)


def test_metrics_has_every_step_and_every_evaluation():
    found = rows(finished())
    assert [row["step"] for row in found if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in found if "eval_loss" in row] == list(range(4, STEPS + 1, 4))
    assert all({"loss", "grad_norm", "lr", "tokens"} < row.keys() for row in found if "loss" in row)
    rates = [row["lr"] for row in found if "loss" in row]
    expected = [1e-3 * min(1.0, math.log(step + 1) / math.log(5)) for step in range(STEPS)]
    assert rates == pytest.approx(expected)


def test_run_json_has_each_setting_with_its_origin_and_what_decides_the_result():
    run = finished()
    (start,) = json.loads((run / "run.json").read_text())["starts"]
    assert start["settings"]["learning_rate"] == 1e-3 and start["settings"]["weight_decay"] == 0.0
    assert start["origins"]["learning_rate"].endswith("recipe.yaml") and start["origins"]["weight_decay"] == "default"
    assert start["settings"].keys() == start["origins"].keys()
    plan, data = start["plan"], start["data"]
    assert (plan["steps"], plan["world"], start["world"]) == (STEPS, 1, 1)
    assert (plan["records"], plan["records_kept"], plan["records_held_out"]) == (RECORDS, RECORDS, HELD_OUT)
    assert all(len(value) == 64 for value in (plan["plan_hash"], plan["order_hash"], data["sha256"]))
    assert start["resumed_from"] is None and start["reason"]
    assert start["versions"]["torch"] == torch.__version__ and {"python", "transformers"} < start["versions"].keys()


def test_without_a_terminal_there_is_text_and_no_progress_bar():
    folder = finished().parent
    for stream in ("stdout", "stderr"):
        text = (folder / stream).read_bytes()
        assert b"\r" not in text and b"\x1b" not in text, text
    says = (folder / "stdout").read_text()
    assert "learning_rate           0.001  (" in says and "weight_decay            0.0  (default)" in says
    assert f"{RECORDS} records, {RECORDS} kept" in says and f"steps {STEPS}, world 1" in says
    assert "starting from the base model" in says and f"wrote {folder / 'run' / 'final'}" in says
    assert "Traceback" not in (folder / "stderr").read_text()


def test_the_same_command_gives_the_same_bits(tmp_path):
    complete(write_recipe(tmp_path))
    assert rows(tmp_path / "run") == rows(finished())
    ours, theirs = weights(tmp_path / "run"), weights(finished())
    assert len(ours) > 20 and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def pad_batches() -> None:
    prepare.packed = lambda config: padded(4)


def test_padded_batches_give_the_same_losses(tmp_path):
    run = complete(write_recipe(tmp_path), before=pad_batches)
    assert "useful_share 1.0," in (finished().parent / "stdout").read_text() and "useful_share 0." in run.stdout()
    close(tmp_path / "run", finished(), 1e-5)
    same_weights(tmp_path / "run", finished())


def test_recomputed_activations_give_the_same_losses(tmp_path):
    complete(write_recipe(tmp_path, checkpoint_activations=True))
    close(tmp_path / "run", finished(), 1e-6)


def test_a_run_may_hold_nothing_out_and_end_its_epoch_with_a_smaller_step(tmp_path):
    run = complete(write_recipe(tmp_path, test_size=0, global_batch_size=7, epochs=1, eval_every=0, save_every=100))
    steps = math.ceil(RECORDS / 7)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, steps + 1))
    assert f"steps {steps}, " in run.stdout()
    assert (tmp_path / "run" / f"checkpoint-{steps}" / "complete.json").exists()  # the last step is always saved


def test_a_flag_overrides_the_file_and_tensorboard_gets_its_events(tmp_path):
    recipe = write_recipe(tmp_path, epochs=9)
    complete(recipe, "--epochs", "1", "--report-to", "tensorboard", "--output-dir", str(tmp_path / "other"))
    (start,) = json.loads((tmp_path / "other" / "run.json").read_text())["starts"]
    assert (start["settings"]["epochs"], start["origins"]["epochs"]) == (1, "--epochs")
    assert list((tmp_path / "other" / "tensorboard").rglob("events.out.*"))
    assert not (tmp_path / "run").exists()


# Several processes


@needs_deepspeed
@pytest.mark.parametrize("zero_stage", ["2", "3"])
def test_two_processes_give_the_losses_of_one(zero_stage):
    run = finished(2, zero_stage)
    close(run, finished(), 1e-5)
    same_weights(run, finished())
    assert {finding.status for finding in check_directory(run / "final")} == {"ok"}
    assert "\r" not in (run.parent / "stdout").read_text()


@needs_deepspeed
def test_one_process_with_deepspeed_gives_the_losses_of_one_without(tmp_path):
    complete(write_recipe(tmp_path), "--zero-stage", "1")
    close(tmp_path / "run", finished(), 1e-5)
    same_weights(tmp_path / "run", finished())


LAUNCHERS = {
    "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"],
    "accelerate": ["accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1",
                   "--main_process_port"],
}  # fmt: skip


@needs_deepspeed
@pytest.mark.parametrize("name", LAUNCHERS)
def test_other_launchers_give_the_losses_of_torchrun(tmp_path, name):
    recipe = write_recipe(tmp_path)
    launcher = ["-m", *LAUNCHERS[name], str(free_port())]
    done = launch(*launcher, "--module", "train.finetune", str(recipe), "--zero-stage", "2", "--max-length", "512")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(tmp_path / "run") == rows(finished(2, "2"))


def test_a_mistake_is_told_by_one_of_the_processes(tmp_path):
    run = Processes(write_recipe(tmp_path), "--max-length", "513", world=2)
    assert run.wait() == [2, 2]
    assert run.stderr(0).startswith("train.finetune: max_length is 513, but")
    assert run.stderr(1) == run.stdout(1) == "" and not (tmp_path / "run").exists()


def test_another_process_speaks_only_of_what_may_be_its_own_trouble(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    recipe = str(write_recipe(tmp_path))

    def fail(resolved):
        with writing(tmp_path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune, "run", fail)
    assert main([recipe]) == 2
    assert "cannot be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert main([recipe, "--epochs", "0"]) == 2
    assert capsys.readouterr().err == ""


# Mistakes


def jsonl(path: Path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


EMPTY = {"instruction": "", "response": "Red."}
GOOD = {"instruction": "Name a colour.", "response": "Red."}
MISTAKES = {
    "no record file": lambda at: (["--dataset", f"{at}/none.jsonl"], "none.jsonl' cannot be read"),
    "no usable record": lambda at: (
        ["--dataset", jsonl(at / "r.jsonl", EMPTY, EMPTY)],
        "none of the 2 records is usable",
    ),
    "strict": lambda at: (
        ["--dataset", jsonl(at / "r.jsonl", *[GOOD] * 20, EMPTY), "--strict", "true"],
        "1 of 21 records are unusable (empty_instruction 1): line 21",
    ),
    "no such column": lambda at: (["--columns", "{response: answer}"], "no column 'answer'"),
    "no such model": lambda at: (["--model", f"{at}/none"], "none: no such directory"),
    "longer than the window": lambda at: (["--max-length", "513"], "max_length is 513, but"),
    "everything held out": lambda at: (["--test-size", str(RECORDS)], f"test_size is {RECORDS}, it must be"),
    "wrong type": lambda at: (["--epochs", "two"], "epochs is 'two', it must be a whole number"),
    "out of range": lambda at: (
        ["--epochs", "0", "--seed", "-1"],
        "seed is -1, it must be at least 0; epochs is 0, it must be at least 1",
    ),
    "unknown choice": lambda at: (["--schedule", "steep"], "schedule is 'steep', it must be one of warmup, cosine"),
    "unknown flag": lambda at: (["--learning-rat", "1"], "'--learning-rat'. Did you mean '--learning-rate'?"),
    "abbreviated flag": lambda at: (["--learning", "1"], "unknown argument '--learning'"),
    "one word too many": lambda at: (["train"], "unknown argument 'train'"),
    "flag without a value": lambda at: (
        ["--epochs"],
        "--epochs: expected one argument; see train.finetune --help",
    ),
    "no such logger": lambda at: (["--report-to", "tensorboard,paper"], "report_to names paper, which is not inst"),
    "no such checkpoint": lambda at: (["--resume", f"{at}/checkpoint-7"], "not a checkpoint directory"),
    "offload from no GPU": lambda at: (["--offload", "all"], "offload is 'all', but there is no GPU"),
}


def refused(capfd, arguments: list[str]) -> str:
    """The one line that a bad command ends with."""
    assert main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("train.finetune: ")]
    assert len(told) == 1 and told == lines[-1:], lines
    assert not any("Traceback" in line for line in lines)
    return told[0]


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(tmp_path, capfd, mistake):
    if torch.cuda.is_available() and mistake is MISTAKES["offload from no GPU"]:
        pytest.skip("there is a GPU")
    flags, says = mistake(tmp_path)
    assert says in refused(capfd, [str(write_recipe(tmp_path)), *flags])
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert left == ({PROBLEMS_FILE} if "are unusable" in says or "is usable" in says else set())


RECIPES = {
    "no file": (None, "recipe.yaml: cannot be read: No such file"),
    "not YAML": ("model: [1", "recipe.yaml: not YAML"),
    "a list": ("- model", "must hold `key: value` lines, found a list"),
    "unknown key": ("learning_rat: 1", "unknown setting 'learning_rat'. Did you mean 'learning_rate'?"),
    "nothing required": ("epochs: 1", "model is missing: set it in the file or with --model; dataset is missing"),
}


@pytest.mark.parametrize(("text", "says"), RECIPES.values(), ids=RECIPES)
def test_a_bad_recipe_is_one_line(tmp_path, capfd, text, says):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    assert says in refused(capfd, [str(tmp_path / "recipe.yaml")])
    assert len(list(tmp_path.iterdir())) == (text is not None)


def test_no_recipe_at_all_is_one_line(capfd):
    assert "the following arguments are required: recipe" in refused(capfd, [])


def test_a_finished_run_is_not_overwritten(tmp_path, capfd):
    recipe = write_recipe(tmp_path)
    shutil.copytree(finished(), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert "final: this run is finished; give another output_dir" in refused(capfd, [str(recipe)])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize("place", ["recipe.yaml", "recipe.yaml/run"])
def test_an_output_dir_that_cannot_be_made_is_one_line(tmp_path, capfd, place):
    recipe = write_recipe(tmp_path)
    line = refused(capfd, [str(recipe), "--output-dir", str(tmp_path / place)])
    assert f"{tmp_path / place} cannot be written" in line


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "--tokens-per-batch" in capsys.readouterr().out
