"""Two processes, two passes each, under ZeRO 1, 2 and 3: the gradient of one record at a time in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytest.importorskip("deepspeed", reason="deepspeed is not installed (it is in the extra `train`)")


def test_zero_over_two_ranks_and_two_passes_has_the_gradient_of_one_record_at_a_time(tmp_path):
    target = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        str(ROOT / "tests" / "support" / "parallel_gradient.py"),
        str(target),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(target.read_text())
    assert set(found) == {"1", "2", "3"}
    for stage, row in found.items():
        assert row["loss"] == pytest.approx(1, rel=1e-6), stage
        assert row["error"] < 1e-6, (stage, row)
