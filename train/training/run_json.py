"""run.json: for each start of a run every setting with its origin, the data, the plan, the hardware and the versions.

publishing/run_metadata.py reads it for the model card.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from pathlib import Path
from typing import Any

import modelscope_dolly
from modelscope_dolly.files import write_json
from train.config import Resolved
from train.data.entries import dataset_name
from train.planning.zero_stage import ZeroChoice
from train.prepare import PreparedData
from train.training.checkpoints import RunCheckpoint
from train.training.report import read_starts


def record_start(
    path: Path,
    resolved: Resolved,
    data: PreparedData,
    choice: ZeroChoice,
    base: dict[str, Any],
    resume: RunCheckpoint | None,
) -> None:
    """Append this start of the run to run.json; `base` describes the base model."""
    versions = {
        name: sys.modules[name].__version__ for name in ("torch", "transformers", "deepspeed") if name in sys.modules
    }
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": dataclasses.asdict(resolved.config),
        "origins": resolved.origins,
        "data": {"dataset": dataset_name(resolved.config.dataset), "sha256": data.sha256},
        "plan": data.summary() | {"order_hash": data.plan.order_hash},
        "base": base,
        "world": data.plan.world,
        "hardware": {"name": choice.hardware.name, "gpus": choice.hardware.gpus},
        "chosen": {
            "dtype": choice.dtype,
            "zero_stage": choice.stage,
            "offload": choice.offload,
            "checkpoint_activations": choice.recompute,
        },
        "reason": choice.reason,
        "resumed_from": str(resume.path) if resume else None,
        "versions": {"modelscope_dolly": modelscope_dolly.__version__, "python": platform.python_version(), **versions},
    }
    earlier = read_starts(path) if path.exists() else []
    write_json(path, {"starts": [*earlier, start]})


def record_end(path: Path, step: int, lines: list[str]) -> None:
    """Add to the last start which step the weights of the finished model are of, and what there is to say about it."""
    starts = read_starts(path)
    starts[-1]["final"] = {"step": step, "notes": lines}
    write_json(path, {"starts": starts})
