"""Comparing weights with the manifest beside their reading, and remembering which files have been compared."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

from modelscope_dolly.checkpoint import manifest, verification
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.verification import RememberedDigests, Verification
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.files import file_sha256
from modelscope_dolly.load import load, load_network

SECOND = 1_000_000_000


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def settled(monkeypatch):
    """Files that were written just now count as old enough to be remembered."""
    monkeypatch.setattr(verification, "_SETTLED_NS", -SECOND)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache" / "verified.json"


def hashed(cache: Path, file: Path) -> bool:
    """Ask for the digest of a file as a new process would; whether it was read."""
    read = []
    digests = RememberedDigests(cache)
    assert digests.sha256(file, lambda: read.append(1)) == file_sha256(file)
    digests.save()
    return bool(read)


def test_a_file_is_hashed_once(file, cache, settled):
    assert [hashed(cache, file) for _ in range(3)] == [True, False, False]
    assert cache.stat().st_mode & 0o777 == 0o600 and cache.parent.stat().st_mode & 0o777 == 0o700


def _same_size(file: Path) -> None:
    file.write_bytes(b"weightZ")


def _same_size_and_time(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"weightZ")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _through_a_mapping(file: Path) -> None:
    torch.UntypedStorage.from_file(str(file), shared=True, nbytes=7)[6] = 90


def _another_under_its_name(file: Path) -> None:
    other = shutil.copy2(file, file.with_name("other"))
    Path(other).write_bytes(b"weightZ")
    shutil.copystat(file, other)
    os.replace(other, file)


def _linked_elsewhere(file: Path) -> None:
    other = file.with_name("other")
    os.link(file, other)  # the ctime is that of the inode: whoever writes by another name changes it too
    _same_size_and_time(other)


def _permissions(file: Path) -> None:
    file.chmod(0o400)


CHANGES = (
    _same_size,
    _same_size_and_time,
    _through_a_mapping,
    _another_under_its_name,
    _linked_elsewhere,
    _permissions,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_whatever_touches_a_file_makes_it_be_hashed_again(file, cache, settled, change):
    """The kernel stamps a change with a clock of some milliseconds: the change waits until that has moved on."""
    assert hashed(cache, file)
    before, tick = file.stat().st_ctime_ns, file.with_name("tick")
    while True:  # until a file that is written now gets a later time
        tick.write_bytes(b"")
        if tick.stat().st_ctime_ns > before:
            break
    change(file)
    assert hashed(cache, file) and not hashed(cache, file)


def test_a_file_that_was_changed_just_now_is_not_remembered(file, cache):
    """It could be changed again within the grain of the clock."""
    assert [hashed(cache, file) for _ in range(2)] == [True, True]
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(file, cache, settled):
    digests = RememberedDigests(cache)
    digests.sha256(file, lambda: file.write_bytes(b"longer than before"))
    digests.save()
    assert not cache.exists()


def _harm(cache: Path, kind: str) -> None:
    content = json.loads(cache.read_text())
    [key] = content["sha256"]
    lies = {"bad digest": {key: "0" * 63}, "a number": {key: 5}, "bad key": {"x": "0" * 64}, "a list": [key]}
    if kind == "writable by others":
        cache.write_text(json.dumps({**content, "sha256": {key: "0" * 64}}))
        cache.chmod(0o622)
    elif kind == "a link":
        (cache.with_name("real")).write_text(json.dumps({**content, "sha256": {key: "0" * 64}}))
        cache.unlink()
        cache.symlink_to("real")
    elif kind == "a pipe":
        cache.unlink()
        os.mkfifo(cache)
    elif kind == "a directory":
        cache.unlink()
        cache.mkdir()
    elif kind == "another version":
        cache.write_text(json.dumps({"version": 2, "sha256": {key: "0" * 64}}))
    elif kind in lies:
        cache.write_text(json.dumps({**content, "sha256": lies[kind]}))
    else:
        cache.write_bytes({"empty": b"", "half": cache.read_bytes()[:20], "bytes": b"\xff\x00", "deep": b"[" * 10**5,
                           "huge": b" " * (2 << 20)}[kind])  # fmt: skip


KINDS = ("empty", "half", "bytes", "deep", "huge", "bad digest", "a number", "bad key", "a list", "another version",
         "writable by others", "a link", "a pipe", "a directory")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_is_damaged_or_not_ours_is_as_if_it_were_empty(file, cache, settled, kind):
    hashed(cache, file)
    _harm(cache, kind)
    assert hashed(cache, file)


def test_a_cache_that_cannot_be_written_changes_nothing(file, settled):
    assert [hashed(Path("/dev/null/x/verified.json"), file) for _ in range(2)] == [True, True]


def test_the_files_used_last_are_kept(tmp_path, cache, settled, monkeypatch):
    monkeypatch.setattr(verification, "_MOST_FILES", 3)
    files = [tmp_path / str(number) for number in range(4)]
    for path in files:
        path.write_bytes(path.name.encode())
    for path in (*files[:3], files[0], files[3]):
        hashed(cache, path)
    assert len(json.loads(cache.read_text())["sha256"]) == 3
    assert [hashed(cache, path) for path in (files[3], files[2])] == [False, False]


# Loading


@pytest.fixture
def model(checkpoint_dir, tmp_path) -> Path:
    return shutil.copytree(checkpoint_dir, tmp_path / "model")


@pytest.fixture
def reads(monkeypatch, settled, tmp_path) -> list[Path]:
    """Weight files that are hashed, with a cache of the test's own."""
    found = []
    original = verification.stream_sha256

    def sha256(file, before_each):
        found.append(Path(file.name).name)
        return original(file, before_each)

    monkeypatch.setattr(verification, "stream_sha256", sha256)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return found


def test_true_hashes_once_always_each_time_false_never(model, reads):
    for verify, count in ((True, 1), (True, 0), ("always", 1), (True, 0), (False, 0)):
        reads.clear()
        load(model, device="cpu", verify=verify)
        assert reads == ["model.safetensors"] * count, verify


def test_a_remembered_file_is_still_compared_with_the_manifest(model, reads):
    load(model, device="cpu")
    reads.clear()
    content = json.loads((model / manifest.NAME).read_text())
    content["files"]["model.safetensors"]["sha256"] = "0" * 64
    (model / manifest.NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its content changed"):
        load(model, device="cpu")
    assert reads == []


def test_what_differs_is_not_remembered(model, reads):
    with open(model / "model.safetensors", "r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x01")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="its content changed"):
            load(model, device="cpu")
    assert reads == ["model.safetensors"] * 2


def test_side_files_are_always_read(model, reads):
    load(model, device="cpu")
    before = (model / "config.json").stat()
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("1e-05", "2e-05"))
    os.utime(model / "config.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"config\.json: sha256"):
        load(model, device="cpu")


def test_no_model_comes_out_before_its_files_have_been_compared(model, monkeypatch):
    """However long it takes: the network is complete when the comparison finds the damage."""
    complete = threading.Event()
    original = verification.stream_sha256

    def sha256(file, before_each):
        assert complete.wait(60)
        return original(file, before_each)[:-1] + "x"

    def network(*arguments):
        net = load_network(*arguments)
        complete.set()
        return net

    monkeypatch.setattr(verification, "stream_sha256", sha256)
    monkeypatch.setattr("modelscope_dolly.load.load_network", network)
    with pytest.raises(CheckpointError, match=r"its content changed\. To repair it: ") as caught:
        load(model, device="cpu")
    assert complete.is_set() and "\n" not in str(caught.value)


def test_damage_is_told_by_the_file_that_changed(model, monkeypatch):
    """Not by what the reader stumbles over."""
    monkeypatch.setattr("modelscope_dolly.load.load_network", lambda *_: (_ for _ in ()).throw(CheckpointError("odd")))
    with pytest.raises(CheckpointError, match=r"^odd$"):
        load(model, device="cpu")
    with open(model / "model.safetensors", "r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x01")
    with pytest.raises(CheckpointError, match="its content changed"):
        load(model, device="cpu")


def test_any_other_error_ends_the_hashing(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(3 << 20))
    manifest.write(tmp_path)
    blocks, begun, go_on = [], threading.Event(), threading.Event()
    original = Verification._go_on

    def each_block(self):
        blocks.append(1)
        begun.set()
        assert go_on.wait(60)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verification, "_go_on", each_block)
        running = Verification(tmp_path, ["weights"], remember=False)
        with pytest.raises(KeyboardInterrupt), running.explaining_errors():
            assert begun.wait(60)
            raise KeyboardInterrupt
        go_on.set()
        with pytest.raises(CancelledError):
            running.problems()
    assert len(blocks) == 1


def test_whoever_opens_a_checkpoint_gets_it_compared_in_full(model, reads):
    for _ in range(2):
        open_checkpoint(model)
    assert reads == ["model.safetensors"] * 2
