"""An exported directory is complete or absent, whatever happens on the way."""

import json
import os
import subprocess
import sys

import pytest

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.reader import open_checkpoint
from tests.support.paths import ROOT

_KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from transformers import GPTNeoXForCausalLM
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.writer import export_checkpoint

source, place = map(Path, sys.argv[1:])
model = GPTNeoXForCausalLM.from_pretrained(source)
tokenizer = open_checkpoint(source).tokenizer
watched = {"os.mkdir", "os.rename", "os.remove", "os.chmod", "os.rmdir", "shutil.copyfile", "shutil.rmtree"}

def export_and_die(target, step):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in watched or writes:
            seen += 1
            if seen > step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    export_checkpoint(model, tokenizer, target, replace=True)
    os._exit(0)

steps = {}
for case in ("new", "replacing"):
    for step in range(1000):
        target = place / case / str(step)
        if case == "replacing":
            export_checkpoint(model, tokenizer, target)
            with torch.no_grad():
                model.gpt_neox.final_layer_norm.bias.add_(1)  # what replaces it differs
        if (child := os.fork()) == 0:
            export_and_die(target, step)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    steps[case] = step
print(json.dumps(steps))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_step_of_an_export_leaves_a_whole_directory_or_none(checkpoint_dir, tmp_path):
    command = [sys.executable, "-c", _KILLED, str(checkpoint_dir), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    absent = {}
    for case, steps in json.loads(done.stdout.splitlines()[-1]).items():
        assert steps > 20
        targets = [tmp_path / case / str(step) for step in range(steps + 1)]  # the last one was not killed
        absent[case] = [step for step, target in enumerate(targets) if not target.exists()]
        for target in targets:
            if target.exists():
                assert manifest.read(target) is not None and manifest.differences(target) == []
                open_checkpoint(target)
        assert steps not in absent[case]
    assert len(absent["new"]) > 20
    assert len(absent["replacing"]) <= 1  # between the two renames, and then the old one is whole under its other name
