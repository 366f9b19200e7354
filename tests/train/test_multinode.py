"""Two launchers that find each other over TCP, as on two machines: the run of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modelscope_dolly.checkpoint.check import check_directory
from train import finetune
from train.nano import RECORDS, write_base

pytest.importorskip("deepspeed", reason="deepspeed is not installed (it is in the extra `train`)")
from tests.support.paths import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_nodes_train_what_one_process_trains(tmp_path):
    write_base(tmp_path / "base")
    recipe = tmp_path / "recipe.yaml"
    settings = {"model": str(tmp_path / "base"), "dataset": str(RECORDS), "output_dir": str(tmp_path / "two"),
                "global_batch_size": 16, "max_steps": 3, "learning_rate": 1e-3, "warmup_steps": 2, "test_size": 8,
                "eval_every": 0, "zero_stage": "2", "checkpoint_activations": False, "report_to": "none"}  # fmt: skip
    recipe.write_text(yaml.safe_dump(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    common = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *common, "--node-rank", str(rank), "--module",
             "train.finetune", str(recipe)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert finetune.main([str(recipe), "--output-dir", str(tmp_path / "one"), "--zero-stage", "0"]) == 0
    together, alone = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(together) == 3 and together == pytest.approx(alone, rel=1e-5)
    assert all(finding.status != "problem" for finding in check_directory(tmp_path / "two" / "final"))
    assert "of 16 records" in outputs[0] or "world 2" in outputs[0]
    assert "world 2" not in outputs[1]  # one process speaks for all
