"""dolly plan: what a model needs beside what is here."""

from __future__ import annotations

import json

import pytest

from modelscope_dolly.cli import plan
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.kernels import cpu as kernels


def test_published_sizes_have_the_published_number_of_weights():
    # Counted from the configurations at a vocabulary of 50,280.
    for size, billions in (("3b", 2.775), ("7b", 6.856), ("12b", 11.842)):
        assert plan.plan_figures(size)["parameters"] == pytest.approx(billions * 1e9, rel=2e-4)


def test_devices_that_are_too_small_are_left_out(monkeypatch):
    monkeypatch.setattr(plan, "free_memory_by_device", lambda: {"cpu": 30 * 10**9, "cuda:0": 8 * 10**9})
    figures = plan.plan_figures("12b")
    fits = {row["format"]: row["fits"] for row in figures["formats"]}
    assert fits["fp32"] == [] and fits["bf16"] == ["cpu"] and fits["int8"] == ["cpu"]
    text = plan.format_plan(figures)
    assert "nothing here" in text and "11.842 billion weights" in text


@pytest.mark.parametrize("level", [0, 2])
def test_weights_held_in_bf16_are_offered_where_the_cpu_computes_them(level, checkpoint_dir, monkeypatch):
    monkeypatch.setattr(plan, "free_memory_by_device", lambda: {"cpu": 10**12, "cuda:0": 10**12})
    monkeypatch.setattr(kernels, "level", lambda: level)
    rows = {row["format"]: row for row in plan.plan_figures("7b")["formats"]}
    for name in ("fp32", "bf16", "int8", "int4"):
        assert rows[name]["fits"] == ["cpu", "cuda:0"]
    assert ("fp32/bf16" in rows) == (level > 0)
    if level:
        assert rows["fp32/bf16"]["fits"] == ["cpu"]
        assert "float32 computes" in plan.format_plan(plan.plan_figures("7b"))
    # a checkpoint that is stored in float32 keeps it
    assert "fp32/bf16" not in {row["format"] for row in plan.plan_figures(str(checkpoint_dir))["formats"]}


def test_config_json_says_how_weights_are_stored_in_the_old_spelling_too(checkpoint_dir, tmp_path):
    for spelling, expected in (({"torch_dtype": "bfloat16"}, True), ({"dtype": "float16"}, False), ({}, False)):
        raw = json.loads((checkpoint_dir / "config.json").read_text())
        raw = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")} | spelling
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert plan.model_config(str(tmp_path))[1] == expected


def test_unknown_model_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        plan.plan_figures(str(tmp_path / "nothing"))
