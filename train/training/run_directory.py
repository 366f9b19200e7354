"""The run directory at both ends: what killed starts have left in it, and what is missing after an export."""

from __future__ import annotations

import re
from pathlib import Path

from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.errors import CheckpointError, SettingError
from modelscope_dolly.files import remove_leftovers
from train.config import TrainConfig
from train.training.checkpoints import reject
from train.training.elastic_resume import remove_conversions
from train.training.lora import ADAPTER
from train.training.report import METRICS, PICTURE, cut_metrics, draw_loss, read_starts, summary
from train.training.resume_choice import OF_THE_ORDER, OF_THE_RESULT, ResumeChoice, differing_settings

FINAL = "final"
_UNFINISHED_FILE = re.compile(r"\.(run\.json|(metrics|samples|data_problems)\.jsonl|loss\.png|report\.md)\.[0-9]+\.tmp")


def prepare_directory(output: Path, resume: ResumeChoice) -> None:
    """Remove what starts of this run have left that were killed, and cut its metrics to the step it resumes from.

    For the first process, which holds the lock of the directory.

    Raises:
        CheckpointError: metrics.jsonl is damaged.
    """
    cut_metrics(output / METRICS, resume.checkpoint.step if resume.checkpoint else 0)
    removed = [path for name in (FINAL, ADAPTER) for path in remove_leftovers(output / name)]
    removed += remove_conversions(output)
    for path in removed:
        print(f"removed {path}, left by a start of this run that was killed")
    for path in output.glob(".*.tmp"):
        if _UNFINISHED_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    for path in resume.damaged:
        reject(path)


def finish(config: TrainConfig, final: Path) -> None:
    """Do what a run that was killed after its export has left undone, besides publishing. For the first process.

    Raises:
        SettingError: nothing is left to do, or the settings are those of another run.
        CheckpointError: the exported model is damaged.
    """
    run = final.parent
    finished = f"{final}: this run is finished; give another output_dir, or remove it"
    before = read_starts(run / "run.json")[-1].get("settings") if (run / "run.json").exists() else None
    if isinstance(before, dict):
        differing = differing_settings(before, vars(config))
        decisive = [line for name, line in differing if name in OF_THE_ORDER + OF_THE_RESULT]
        if decisive:
            raise SettingError(f"{finished}. It had other settings: {'; '.join(decisive)}")
    picture = None if (run / PICTURE).exists() else draw_loss(run)
    if picture is None and not config.publish:
        raise SettingError(finished)
    problems = [finding.detail for finding in check_directory(final) if finding.status == "problem"]
    if problems:
        raise CheckpointError(
            f"{final} has problems: {'; '.join(problems[:3])}. Remove it, and the same command exports it again"
        )
    done = f"; drew {picture}, which was missing" if picture else ""
    print(f"{final}: this run has been trained and exported already{done}", summary(run), sep="\n")
