"""An exported directory is complete or absent, whatever happens on the way."""

import json
import os
import subprocess
import sys

import pytest

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.writer import new_directory
from modelscope_dolly.errors import CheckpointError
from tests.support.paths import ROOT


def test_a_block_that_ends_well_becomes_the_target(tmp_path):
    with new_directory(tmp_path / "deep" / "target") as directory:
        (directory / "file").write_text("text", encoding="utf-8")
        assert not (tmp_path / "deep" / "target").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]
    assert (tmp_path / "deep" / "target" / "file").read_text(encoding="utf-8") == "text"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_block_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path, error, existing):
    target = tmp_path / "target"
    if existing:
        target.mkdir()
        (target / "old").write_text("old", encoding="utf-8")
    with pytest.raises(error), new_directory(target, replace=True) as directory:
        (directory / "new").write_text("new", encoding="utf-8")
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == (["target", "old"] if existing else [])


def test_an_existing_directory_is_only_replaced_on_demand(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(CheckpointError, match="exists already"), new_directory(target):
        pytest.fail("the block must not begin")
    with new_directory(target, replace=True) as directory:
        (directory / "new").write_text("new", encoding="utf-8")
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "new"]


def test_a_file_is_never_replaced(tmp_path):
    target = tmp_path / "target"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exists already"), new_directory(target, replace=True):
        pytest.fail("the block must not begin")
    assert target.read_text(encoding="utf-8") == "old"


def test_behind_a_link_the_directory_it_points_to_is_replaced(tmp_path):
    place, link = tmp_path / "disk" / "place", tmp_path / "link"
    place.mkdir(parents=True)
    link.symlink_to(place)
    with new_directory(link, replace=True) as directory:
        (directory / "new").write_text("new", encoding="utf-8")
    assert link.is_symlink() and (place / "new").exists()
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_two_writers_of_one_target_do_not_mix_and_the_second_does_not_overwrite(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(CheckpointError, match="exists already"), new_directory(target) as slow:
        with new_directory(target) as fast:
            assert fast != slow
            (fast / "fast").write_text("fast", encoding="utf-8")
        (slow / "slow").write_text("slow", encoding="utf-8")
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "fast"]


def test_what_a_killed_process_left_is_not_in_the_way_of_the_next_with_its_number(tmp_path):
    target = tmp_path / "target"
    for name in (f".target.{os.getpid()}.incomplete", f".target.{os.getpid()}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half", encoding="utf-8")
    for text in ("first", "second"):
        with new_directory(target, replace=True) as directory:
            (directory / text).write_text(text, encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["second"]


_KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from transformers import GPTNeoXForCausalLM
from modelscope_dolly.checkpoint import open_checkpoint
from modelscope_dolly.export import export_checkpoint

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
                assert manifest.read(target) is not None and manifest.problems(target) == []
                open_checkpoint(target)
        assert steps not in absent[case]
    assert len(absent["new"]) > 20
    assert len(absent["replacing"]) <= 1  # between the two renames, and then the old one is whole under its other name
