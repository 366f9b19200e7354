"""Differences between a revision and a hub, and the commits that remove them."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.errors import CheckpointError
from tests.support.publishing import final_fixture  # noqa: F401
from train.publishing.remote_files import (
    FileDigest,
    RevisionDifference,
    commit_action,
    compare,
    is_blob,
    make_commits,
    split_actions,
)


def test_compare_sees_size_and_sha256():
    files = {"a": FileDigest(1, "x"), "b": FileDigest(2, "y"), "c": FileDigest(3, "z")}
    difference = compare(files, {"a": (1, "x"), "b": (2, "n"), "d.py": (1, "q"), "sub/.gitattributes": (1, "r")})
    assert (difference.missing, difference.changed) == (["c"], ["b"])
    assert difference.stale == difference.misleading == ["d.py"]
    assert compare(files, {**files, "b": (5, "y")}).changed == ["b"] and compare(files, files).mismatches == []


def test_blobs_are_what_the_client_takes_for_blobs():
    from modelscope_hub._upload import _is_lfs

    for name in ("README.md", "config.json", "tokenizer.json", "model.safetensors", "loss.png", "x.jinja", "a/b.bin"):
        for size in (0, 65_536, 65_537, 1 << 30):
            assert is_blob(name, size) == _is_lfs(name, size, "model"), (name, size)


def test_commits_are_cut_by_number_and_by_size_and_end_with_the_manifest():
    assert split_actions([]) == []
    assert [len(batch) for batch in split_actions([{"path": str(n)} for n in range(450)])] == [200, 200, 50]
    assert [len(batch) for batch in split_actions([{"content": "x" * (3 << 20)}] * 3)] == [1, 1, 1]
    names = ["manifest.json", "z.safetensors", "a.safetensors"]
    files = dict.fromkeys(names, FileDigest(1 << 20, "x"))
    for prune, deleted in ((True, ["old"]), (False, [])):
        [actions] = make_commits(Path(), files, RevisionDifference(names, [], ["old"]), prune)
        assert [action["path"] for action in actions] == [*deleted, "a.safetensors", "z.safetensors", "manifest.json"]


def test_small_files_are_read_again_before_they_are_committed(final):
    name, entry = "config.json", manifest.read(final)["config.json"]
    assert commit_action(final, name, entry["size"], entry["sha256"])["type"] == "normal"
    (final / name).write_text((final / name).read_text().replace("1024", "1025"))
    with pytest.raises(CheckpointError, match="changed after it was staged"):
        commit_action(final, name, entry["size"], entry["sha256"])
