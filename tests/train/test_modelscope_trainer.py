"""ModelScope's build_trainer runs the recipe."""

from __future__ import annotations

import pytest
from modelscope.trainers import build_trainer

import train.modelscope_trainer  # noqa: F401 (registers)
from modelscope_dolly import dolly_pipeline
from modelscope_dolly.errors import DollyError, SettingError
from train.nano import RECORDS, write_base


@pytest.fixture
def settings(tmp_path) -> dict:
    write_base(tmp_path / "base")
    return {"model": str(tmp_path / "base"), "dataset": str(RECORDS), "output_dir": str(tmp_path / "run"),
            "global_batch_size": 32, "max_steps": 2, "test_size": 8, "eval_every": 1, "report_to": "none",
            "checkpoint_activations": False}  # fmt: skip


def test_build_trainer_trains_and_evaluates(settings):
    trainer = build_trainer("dolly-v2-sft", default_args=dict(settings))
    with pytest.raises(DollyError, match="call train"):
        trainer.evaluate()
    directory = trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert isinstance(dolly_pipeline(directory, device="cpu")("Name a colour.", max_new_tokens=4)["text"], str)


def test_a_recipe_and_settings_on_top_of_it(settings, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 7\nseed: 3\n")
    trainer = build_trainer("dolly-v2-sft", default_args={**settings, "recipe": str(recipe), "seed": 4})
    assert (trainer.resolved.config.epochs, trainer.resolved.config.seed) == (7, 4)
    assert trainer.resolved.origins["epochs"] == str(recipe) and trainer.resolved.origins["seed"] == "default_args"


def test_an_unknown_setting_is_a_setting_error(settings):
    with pytest.raises(SettingError, match="Did you mean 'epochs'"):
        build_trainer("dolly-v2-sft", default_args={**settings, "epoch": 1})
