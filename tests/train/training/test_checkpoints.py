"""Checkpoints of a run: complete and sound, or ignored; older ones are removed only after that."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelscope_dolly.errors import DollyError
from tests.support.training_runs import as_earlier_versions_marked
from train.training import checkpoints
from train.training.checkpoints import (
    MARKER,
    Origin,
    digests,
    mark_complete,
    newest_complete,
    open_run_checkpoint,
    prune,
    reject,
    run_checkpoints,
    writing,
)

ORDER = "order of the records"


def unmarked(run: Path, step: int) -> Path:
    """What a save leaves that was interrupted before its end."""
    path = run / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * 10)
    (path / "global_step" / "rank_0.pt").write_bytes(b"states" * step)
    return path


def saved(run: Path, step: int) -> Path:
    path = unmarked(run, step)
    mark_complete(path, 2, Origin(f"plan of step {step}", ORDER))
    return path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_marked_checkpoint_is_read_back(tmp_path):
    found = open_run_checkpoint(saved(tmp_path, 7))
    assert (found.path.name, found.step, found.world) == ("checkpoint-7", 7, 2)
    assert (found.origin.plan_hash, found.origin.order_hash) == ("plan of step 7", ORDER)
    listed = json.loads((found.path / MARKER).read_text())["files"]
    assert {name: entry["size"] for name, entry in listed.items()} == {
        "model.safetensors": 70,
        "global_step/rank_0.pt": 42,
    }
    assert listed["model.safetensors"]["sha256"] == hashlib.sha256(b"weights" * 10).hexdigest()


def test_the_marker_appears_whole_after_everything_else(tmp_path, monkeypatch):
    path = unmarked(tmp_path, 3)
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mark_complete(path, 1, Origin("plan", ORDER))
    assert sorted(names(path.iterdir())) == ["global_step", "model.safetensors"]
    monkeypatch.undo()
    mark_complete(path, 1, Origin("plan", ORDER))
    assert open_run_checkpoint(path).step == 3


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


DAMAGES = {
    "unfinished": (lambda path: (path / MARKER).unlink(), "incomplete, complete.json is missing"),
    "file cut": (lambda path: cut(path / "global_step" / "rank_0.pt"), "rank_0.pt: 27 bytes, expected 54 bytes"),
    "file longer": (lambda path: (path / "model.safetensors").write_bytes(b"w" * 71), "71 bytes, expected 70 bytes"),
    "file gone": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: missing, expected 70 bytes"),
    "marker cut": (lambda path: cut(path / MARKER), "complete.json: not JSON"),
    "marker empty": (lambda path: (path / MARKER).write_text(""), "complete.json: not JSON"),
    "marker a list": (lambda path: (path / MARKER).write_text("[]"), "must hold a JSON object, found list"),
    "no facts": (lambda path: (path / MARKER).write_text('{"files": {}}'), "complete.json: damaged"),
    "files a list": (lambda path: (path / MARKER).write_text('{"files": [1]}'), "complete.json: damaged"),
    "marker a folder": (lambda path: ((path / MARKER).unlink(), (path / MARKER).mkdir()), "cannot be read"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_an_incomplete_checkpoint_is_skipped_with_the_reason(tmp_path, damage, says):
    saved(tmp_path, 6), damage(saved(tmp_path, 9))
    with pytest.raises(DollyError, match=says):
        open_run_checkpoint(tmp_path / "checkpoint-9")
    found, skipped = newest_complete(tmp_path)
    assert found.step == 6 and len(skipped) == 1
    assert "checkpoint-9" in skipped[0] and says in skipped[0]


def test_newest_means_the_highest_step_and_other_names_are_left_alone(tmp_path):
    for step in (10, 9, 100):
        saved(tmp_path, step)
    (tmp_path / "checkpoint-500").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-700.old").mkdir()
    assert names(run_checkpoints(tmp_path)) == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert newest_complete(tmp_path)[0].step == 100


def flip(path: Path, offset: int, count: int = 1) -> None:
    """Invert bytes; the size stays."""
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(byte ^ 0xFF for byte in data[offset : offset + count])
    path.write_bytes(data)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[Path, bytes]:
    """A checkpoint: its files and what is in them, to be put back."""
    path = saved(tmp_path_factory.mktemp("sound"), 5)
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@settings(deadline=None)
@given(st.data())
def test_any_flipped_byte_of_any_file_is_found(sound, data):
    file = data.draw(st.sampled_from(sorted(sound)))
    path = next(name.parent for name in sound if name.name == MARKER)
    flip(file, data.draw(st.integers(0, len(sound[file]) - 1)), data.draw(st.integers(1, 8)))
    try:
        with pytest.raises(DollyError) as error:
            open_run_checkpoint(path, verify=True)
    finally:
        file.write_bytes(sound[file])
    assert file.name in str(error.value) and "\n" not in str(error.value)


def test_contents_are_compared_where_that_is_asked_for(tmp_path):
    path = saved(tmp_path, 5)
    flip(path / "model.safetensors", 3)
    assert open_run_checkpoint(path).step == 5
    says = r"model\.safetensors: sha256 [0-9a-f]{12}\.\.\., expected [0-9a-f]{12}\.\.\.: its content changed"
    with pytest.raises(DollyError, match=says):
        open_run_checkpoint(path, verify=True)


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["version", "step", "world", "plan_hash", "order_hash", "files", "settings", "sha256", "size"]
                ),
                inner,
            )
        ),
    )
)
def test_whatever_else_a_marker_holds_is_told_in_one_line(sound, content):
    marker = next(name for name in sound if name.name == MARKER)
    marker.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        with pytest.raises(DollyError) as error:
            open_run_checkpoint(marker.parent, verify=True)
    finally:
        marker.write_bytes(sound[marker])
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_an_earlier_version_has_sizes_only(tmp_path):
    path = saved(tmp_path, 5)
    assert open_run_checkpoint(path).has_digests
    as_earlier_versions_marked(path)
    found = open_run_checkpoint(path, verify=True)
    assert (found.step, found.world, found.has_digests, found.origin.settings) == (5, 2, False, None)


def test_a_rejected_checkpoint_counts_as_incomplete_and_does_not_keep_another_from_being_kept(tmp_path):
    saved(tmp_path, 2), reject(saved(tmp_path, 8))
    assert newest_complete(tmp_path)[0].step == 2 and "found it damaged" in newest_complete(tmp_path)[1][0]
    saved(tmp_path, 4)
    assert names(prune(tmp_path, 1)) == ["checkpoint-2"]
    saved(tmp_path, 9)
    assert names(prune(tmp_path, 1)) == ["checkpoint-8", "checkpoint-4"]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_the_processes_hash_every_file_once(tmp_path, parts):
    path = unmarked(tmp_path, 3)
    found = [digests(path, part, parts) for part in range(parts)]
    assert sum(map(len, found)) == 2 and {name: value for part in found for name, value in part.items()} == digests(
        path
    )


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest_complete_ones(tmp_path, keep):
    steps = (2, 4, 6, 8)
    for step in steps:
        saved(tmp_path, step)
    removed = prune(tmp_path, keep)
    assert names(run_checkpoints(tmp_path)) == [f"checkpoint-{step}" for step in steps[::-1][:keep]]
    assert names(removed) == [f"checkpoint-{step}" for step in steps[::-1][keep:]]
    assert prune(tmp_path, keep) == []


def test_pruning_counts_only_complete_ones_and_leaves_what_is_newer(tmp_path):
    for step in (2, 4, 8):
        saved(tmp_path, step)
    unmarked(tmp_path, 6), unmarked(tmp_path, 10), unmarked(tmp_path, 12)
    (tmp_path / "final").mkdir()
    assert names(prune(tmp_path, 2)) == ["checkpoint-6", "checkpoint-2"]
    assert names(run_checkpoints(tmp_path)) == [f"checkpoint-{step}" for step in (12, 10, 8, 4)]
    assert (tmp_path / "final").is_dir()


def test_pruning_removes_nothing_while_nothing_is_complete(tmp_path):
    unmarked(tmp_path, 2), unmarked(tmp_path, 4)
    assert prune(tmp_path, 1) == [] and len(run_checkpoints(tmp_path)) == 2


def test_a_removal_that_is_interrupted_leaves_no_complete_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 2), saved(tmp_path, 4)
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **keywords: None)
    prune(tmp_path, 1)
    with pytest.raises(DollyError, match="incomplete"):
        open_run_checkpoint(tmp_path / "checkpoint-2")


FULL = {
    "open": lambda: Path("/dev/full").write_text("x"),
    "torch": lambda: torch.save({"x": torch.zeros(9999)}, "/dev/full"),
    "safetensors": lambda: save_file({"x": torch.zeros(9)}, "/dev/null/x"),
}


@pytest.mark.parametrize("write", FULL.values(), ids=FULL)
def test_a_write_that_fails_is_told_in_one_line_with_what_is_free(tmp_path, monkeypatch, write):
    monkeypatch.setattr(checkpoints, "free_disk", lambda path: 12_340_000)
    with pytest.raises(DollyError) as error, writing(tmp_path / "checkpoint-2"):
        write()
    says = str(error.value)
    assert says.startswith(f"{tmp_path / 'checkpoint-2'} cannot be written (") and "0.01 GB are free" in says
    assert "\n" not in says and error.value.__cause__ is not None


def test_an_error_that_is_not_about_writing_stays_what_it_is(tmp_path):
    for lost in (RuntimeError("Connection closed by peer"), ValueError("x")):
        with pytest.raises(type(lost)) as error, writing(tmp_path):
            raise lost
        assert error.value is lost
