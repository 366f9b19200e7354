"""After a run base and result answer held-out records, and where they do not, a line says why."""

from __future__ import annotations

import json

import pytest

from tests.support.training_runs import HELD_OUT, complete, material, write_recipe
from train.config import build
from train.data.validate import TrainingRecord
from train.training.before_after import compare_before_after

HELD = [TrainingRecord("Why?", "", "So.", 1)]


def test_a_run_compares_its_result_with_its_base(tmp_path):
    run = complete(write_recipe(tmp_path, compare_records=50, epochs=2))
    facts = json.loads((tmp_path / "run" / "compare" / "compare.json").read_text())
    assert [model["name"] for model in facts["models"]] == ["before", "after"]
    assert (
        len(facts["records"])
        == HELD_OUT
        == len((tmp_path / "run" / "compare" / "held_out.jsonl").read_text().splitlines())
    )
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert facts["models"][1]["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)  # the same records and tokens
    assert facts["difference"]["high"] < 0
    assert "after minus before: -" in run.stdout() and "## Before and after" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "held_out", "says"),
    [
        ({"compare_records": 0}, HELD, "compare_records is 0"),
        ({}, [], "no records are held out (test_size)"),
        ({}, HELD, "none: no such directory"),
    ],
)
def test_why_there_is_none_is_a_line(tmp_path, capsys, changes, held_out, says):
    config = build({"model": "m", "dataset": "d", "output_dir": str(tmp_path), **changes}).config
    compare_before_after(config, tmp_path / "none", material() / "base", held_out)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("base and result are not compared: ") and says in told
    assert not (tmp_path / "compare").exists()


def test_several_machines_are_no_place_for_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = build({"model": "m", "dataset": "d", "output_dir": "o"}).config
    compare_before_after(config, tmp_path, tmp_path, HELD)
    assert "several machines; dolly compare BASE o/final does it" in capsys.readouterr().out
