"""After a run: base and result answer the same held-out records, within a time that the recipe bounds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from modelscope_dolly.compare import compare_report
from modelscope_dolly.compare.held_out import HeldOutRecord, spread
from modelscope_dolly.compare.side_by_side import ComparedModel, compare
from modelscope_dolly.errors import DollyError
from modelscope_dolly.files import write_atomically
from train.config import TrainConfig
from train.data.validate import TrainingRecord
from train.distributed import world_size

FOLDER, RECORDS_FILE = "compare", "held_out.jsonl"
NAMES = ("before", "after")


def compare_before_after(config: TrainConfig, base: Path, final: Path, held_out: Sequence[TrainingRecord]) -> None:
    """Write the comparison beside `final`, or print why there is none: the run has succeeded without it.

    Args:
        config: of the run; compare_records of the held-out records are answered in at most compare_minutes.
        base: directory of the base model.
        final: directory of the result.
        held_out: none of which was trained on.
    """
    if reason := _reason_against(config, held_out):
        print(f"base and result are not compared: {reason}")
        return
    records = spread([HeldOutRecord(one.instruction, one.context, one.response) for one in held_out],
                     config.compare_records)  # fmt: skip
    print(f"comparing base and result on {len(records)} held-out records, in at most {config.compare_minutes:g} min")
    models = [ComparedModel(str(path), None, name) for path, name in zip((base, final), NAMES, strict=True)]
    folder = final.parent / FOLDER
    try:
        comparison = compare(*models, records, minutes=config.compare_minutes)
        files = compare_report.write(comparison, folder)
        lines = (json.dumps(vars(record), ensure_ascii=False) + "\n" for record in comparison.records)
        write_atomically(folder / RECORDS_FILE, "".join(lines))
    except (DollyError, OSError) as error:
        print(f"base and result are not compared: {error}")
        return
    print(compare_report.text(comparison), f"to read and mark: {files[-1]}", sep="\n")


def _reason_against(config: TrainConfig, held_out: Sequence[TrainingRecord]) -> str | None:
    if not config.compare_records:
        return "compare_records is 0"
    if not held_out:
        return "no records are held out (test_size)"
    if world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", world_size())):
        return f"the run was on several machines; dolly compare BASE {Path(config.output_dir) / 'final'} does it"
    return None
