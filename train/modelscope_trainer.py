"""ModelScope's trainer interface to the recipe, for programs that are built on `build_trainer`.

    import train.modelscope_trainer
    from modelscope.trainers import build_trainer

    directory = build_trainer("dolly-v2-sft", default_args={"model": ..., "dataset": ..., "output_dir": ...}).train()

It only delegates: every setting of train/config.py is a key of default_args.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelscope.trainers.base import BaseTrainer
from modelscope.trainers.builder import TRAINERS

from modelscope_dolly.checkpoint.writer import CONFIGURATION
from modelscope_dolly.errors import DollyError
from train import finetune
from train.config import build
from train.recipe_file import read_recipe

NAME = "dolly-v2-sft"


@TRAINERS.register_module(module_name=NAME, force=True)
class DollyTrainerForModelScope(BaseTrainer):
    """Fine-tune dolly-v2.

    Args:
        settings: the keys of train.config.TrainConfig; `recipe` names a YAML file they are put on top of.
        trust_remote_code: accepted because ModelScope passes it; no code of a repository is ever run.

    Raises:
        SettingError: unknown setting or bad value.
    """

    def __init__(self, recipe: str | None = None, trust_remote_code: bool = False, **settings: Any):
        super().__init__(str(CONFIGURATION))
        values = read_recipe(Path(recipe)) if recipe else {}
        origins = dict.fromkeys(values, str(recipe)) | dict.fromkeys(settings, "default_args")
        self.resolved = build(values | settings, origins)

    def train(self, *arguments: Any, **keywords: Any) -> str:
        """Train, or resume a run that was interrupted; returns the directory of the finished model."""
        return str(finetune.run(self.resolved))

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Held-out loss at the end of the run, as metrics.jsonl has it. Raises DollyError before training."""
        from train.training.report import read_metrics

        run = Path(self.resolved.config.output_dir)
        rows = read_metrics(run)[1]
        if not rows:
            raise DollyError(f"{run}: no evaluation yet: call train() first, with eval_every and test_size above 0")
        return {"eval_loss": rows[-1]["eval_loss"]}
