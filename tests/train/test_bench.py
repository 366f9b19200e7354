"""train.bench compares the two ways to batch; here that it measures what it says, not how fast it is."""

from __future__ import annotations

import json

import pytest
import yaml

from train import bench
from train.nano import RECORDS, write_base


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """It publishes, to a hub that is not there and without a token; a measurement must not ask for either."""
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setenv("MODELSCOPE_CREDENTIALS_PATH", str(tmp_path / "nobody"))
    write_base(tmp_path / "base")
    settings = {"model": str(tmp_path / "base"), "dataset": str(RECORDS), "output_dir": str(tmp_path / "run"),
                "test_size": 8, "global_batch_size": 12, "checkpoint_activations": False,
                "learning_rate": 1e-3, "publish": {"model_id": "me/x", "revision": "v1.0.0"}}  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_both_runs_learn_the_same_from_the_same_records(recipe, capsys, tmp_path):
    assert bench.main([str(recipe), "--steps", "3", "--json", "--warmup-steps", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    padded, packed = found["padded"], found["packed"]
    assert padded["useful_tokens"] == packed["useful_tokens"] > 0
    assert len(packed["losses"]) == 3 and packed["losses"] == pytest.approx(padded["losses"], rel=1e-5)
    for row in (padded, packed):
        slowest, fastest = row["slowest_and_fastest"]
        assert 0 < slowest <= row["useful_tokens_per_s"] <= fastest
        assert slowest <= row["useful_tokens"] / row["seconds"] <= fastest
        assert row["peak_bytes"] > 10**8
    assert "torch" in found["machine"] and not (tmp_path / "run").exists()
    text = bench.comparison({mode: found[mode] for mode in bench.MODES}, 3)
    assert "times the useful tokens per second" in text


def test_too_few_steps_and_a_run_that_fails_are_one_line(recipe, capsys):
    assert bench.main([str(recipe), "--steps", "1"]) == 2
    assert bench.main([str(recipe), "--steps", str(2**64)]) == bench.main([str(recipe), "--processes", "0"]) == 2
    assert bench.main([str(recipe), "--steps", "2", "--dataset", "missing.jsonl"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "at least 2" in lines[0] and "at most 10,000" in lines[1]
    assert "--processes is 0" in lines[2] and "missing.jsonl" in lines[3]
