"""Which checkpoint a run resumes from, and what it says about settings that changed since."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from modelscope_dolly.errors import DollyError, SettingError
from tests.support.training_runs import as_earlier_versions_marked
from train.config import build
from train.training.checkpoints import MARKER, Origin, mark_complete
from train.training.resume_choice import (
    HARMLESS,
    OF_THE_BASE,
    OF_THE_ORDER,
    OF_THE_RESULT,
    choose_resume,
)

SETTINGS = dataclasses.asdict(build({"model": "m", "dataset": "d", "output_dir": "o"}).config)
ORIGIN = Origin(
    "plan", "order", "data", {name: SETTINGS[name] for name in SETTINGS if name not in ("resume", "output_dir")}
)
ANEW = "starting from the base model: no complete checkpoint"


def origin(order_hash: str = "order", data: str = "data", **changes) -> Origin:
    return Origin("plan", order_hash, data, {**ORIGIN.settings, **changes})


def unmarked(run: Path, step: int) -> Path:
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * step)
    return path


def saved(run: Path, step: int, made_by: Origin = ORIGIN) -> Path:
    path = unmarked(run, step)
    mark_complete(path, 1, made_by)
    return path


def damage(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weighty" * int(path.name.partition("-")[2]))


def test_a_new_run_starts_anew_and_says_so(tmp_path):
    assert choose_resume(tmp_path / "none", "auto", ORIGIN) == (None, [ANEW], [])
    assert choose_resume(tmp_path / "none", "no", ORIGIN) == (None, ["starting from the base model (resume: no)"], [])
    unmarked(tmp_path, 4)
    found, lines, damaged = choose_resume(tmp_path, "auto", ORIGIN)
    assert (found, damaged, len(lines)) == (None, [], 2)
    assert lines[0].startswith("skipped: ") and "checkpoint-4" in lines[0]


def test_the_newest_sound_one_is_taken_and_the_damaged_ones_are_named(tmp_path):
    paths = [saved(tmp_path, step) for step in (2, 4, 6)]
    unmarked(tmp_path, 8), damage(paths[1]), damage(paths[2])
    found, lines, damaged = choose_resume(tmp_path, "auto", ORIGIN)
    assert found.step == 2 and damaged == [paths[2], paths[1]]
    assert "checkpoint-8: incomplete" in lines[0]
    assert all("model.safetensors: sha256" in line and "its content changed" in line for line in lines[1:3])
    assert lines[3] == f"resuming from {paths[0]} at step 2"


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path):
    saved(tmp_path, 2), damage(path := saved(tmp_path, 4))
    with pytest.raises(DollyError, match="its content changed"):
        choose_resume(tmp_path, str(path), ORIGIN)


def test_resume_no_does_not_mix_with_checkpoints_that_are_there(tmp_path):
    saved(tmp_path, 2), unmarked(tmp_path, 4)
    with pytest.raises(SettingError, match="holds 2 checkpoints, the newest checkpoint-4; give another output_dir"):
        choose_resume(tmp_path, "no", ORIGIN)


def test_a_named_checkpoint_older_than_the_newest_is_taken_into_another_run_only(tmp_path):
    saved(tmp_path, 2), saved(tmp_path, 4)
    named = str(tmp_path / "checkpoint-2")
    with pytest.raises(SettingError, match=r"step 2, but .*checkpoint-4 is newer; remove the newer checkpoints, or"):
        choose_resume(tmp_path, named, ORIGIN)
    found, lines, _ = choose_resume(tmp_path / "other", named, ORIGIN)
    assert found.step == 2 and lines == [f"resuming from {tmp_path / 'checkpoint-2'} at step 2"]
    (tmp_path / "checkpoint-4" / MARKER).unlink()  # incomplete ones do not count
    assert choose_resume(tmp_path, named, ORIGIN).checkpoint.step == 2


@pytest.mark.parametrize("name", ["checkpoint-8", "final", "checkpoint-5"])
def test_a_named_checkpoint_must_be_a_complete_one(tmp_path, name):
    saved(tmp_path, 2), unmarked(tmp_path, 5)
    (tmp_path / "final").mkdir()
    with pytest.raises(DollyError, match=f"{name}: (not a checkpoint directory|incomplete)"):
        choose_resume(tmp_path, str(tmp_path / name), ORIGIN)


@pytest.mark.parametrize("named", [True, False])
def test_another_order_of_the_records_is_refused_and_what_changed_is_named(tmp_path, named):
    path = saved(tmp_path, 2)
    resume = str(path) if named else "auto"
    with pytest.raises(SettingError, match=r"checkpoint-2: .*\(seed was 42, is 43\); give .* or another output_dir"):
        choose_resume(tmp_path, resume, origin("another order", seed=43, tokens_per_batch=4096))
    as_earlier_versions_marked(path)
    with pytest.raises(SettingError, match=r"checkpoint-2: .*\(data, seed, epochs, .* or another output_dir"):
        choose_resume(tmp_path, resume, origin("another order"))


def test_other_records_of_the_same_lengths_are_refused(tmp_path):
    path = saved(tmp_path, 2)
    for resume in ("auto", str(path)):
        with pytest.raises(SettingError, match="checkpoint-2: was made with other records of the same lengths"):
            choose_resume(tmp_path, resume, origin(data="others"))


OTHER = {
    "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 7, "weight_decay": 0.1, "adam_beta1": 0.5,
    "adam_beta2": 0.5, "adam_epsilon": 1e-4, "gradient_clip": 0.0, "dtype": "bf16", "lora": {"r": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_RESULT)
def test_a_setting_that_changes_the_result_is_refused_unless_the_checkpoint_is_named(tmp_path, name):
    path, now = saved(tmp_path, 2), origin(**{name: OTHER[name]})
    with pytest.raises(SettingError) as error:
        choose_resume(tmp_path, "auto", now)
    says = str(error.value)
    changed = f"{name} was {ORIGIN.settings[name]!r}, is {OTHER[name]!r}"
    assert changed in says and f"--resume {path}" in says and "another output_dir" in says and "\n" not in says
    found, lines, _ = choose_resume(tmp_path, str(path), now)
    assert found.step == 2 and lines[0] == f"changed, and with it the result: {changed}"
    assert choose_resume(tmp_path, "auto", ORIGIN).checkpoint.step == 2


@pytest.mark.parametrize("name", HARMLESS + OF_THE_BASE)
def test_a_setting_that_does_not_is_told(tmp_path, name):
    saved(tmp_path, 2)
    found, lines, _ = choose_resume(tmp_path, "auto", origin(**{name: "other"}))
    assert found.step == 2
    assert lines[0] == f"changed since the checkpoint: {name} was {ORIGIN.settings[name]!r}, is 'other'"


@pytest.mark.parametrize("name", OF_THE_BASE)
def test_with_adapters_the_base_model_changes_the_result(tmp_path, name):
    saved(tmp_path, 2, origin(lora={"r": 4}))
    with pytest.raises(SettingError, match=f"{name} was '.*', is 'other'"):
        choose_resume(tmp_path, "auto", origin(lora={"r": 4}, **{name: "other"}))


@pytest.mark.parametrize("name", OF_THE_ORDER)
def test_settings_of_the_order_that_give_the_same_order_are_told(tmp_path, name):
    saved(tmp_path, 2)
    assert f"changed since the checkpoint: {name} was" in choose_resume(tmp_path, "auto", origin(**{name: 99})).lines[0]


def test_a_checkpoint_of_an_earlier_version_is_resumed_and_what_is_not_known_is_told(tmp_path):
    as_earlier_versions_marked(path := saved(tmp_path, 2))
    found, lines, _ = choose_resume(tmp_path, "auto", origin(learning_rate=1.0))
    assert found.step == 2
    assert lines == [
        f"{path} is of an earlier version, without settings: whether they changed is not known",
        f"{path} is of an earlier version, without digests: only sizes of files were compared",
        f"resuming from {path} at step 2",
    ]
