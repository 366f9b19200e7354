"""What a revision is, without a hub: names, differences, commits."""

from __future__ import annotations

import pytest

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.errors import CheckpointError, SettingError
from tests.support.publishing import final_fixture  # noqa: F401
from train.publishing.remote_files import Destination, action_for, batches, compare, is_blob, ordered


def test_destination_takes_one_host_or_a_list_and_refuses_others():
    values = {"model_id": "me/x", "revision": "v1"}
    assert Destination.of({**values, "trust_storage_host": "a"}).trust_storage_host == ("a",)
    assert Destination.of({**values, "trust_storage_host": ["a", "b"]}).trust_storage_host == ("a", "b")
    for name, bad in (("trust_storage_host", 5), ("prune", "yes"), ("visibility", []), ("license", "a b")):
        with pytest.raises(SettingError, match=name):
            Destination.of({**values, name: bad})


def test_compare_sees_size_and_sha256():
    files = {"a": (1, "x"), "b": (2, "y"), "c": (3, "z")}
    found = compare(files, {"a": (1, "x"), "b": (2, "n"), "d.py": (1, "q"), "sub/.gitattributes": (1, "r")})
    assert (found.missing, found.other, found.stale, found.misleading) == (["c"], ["b"], ["d.py"], ["d.py"])
    assert compare(files, {**files, "b": (5, "y")}).other == ["b"] and compare(files, files).wrong == []


def test_blobs_are_what_the_client_takes_for_blobs():
    from modelscope_hub._upload import _is_lfs

    for name in ("README.md", "config.json", "tokenizer.json", "model.safetensors", "loss.png", "x.jinja", "a/b.bin"):
        for size in (0, 65_536, 65_537, 1 << 30):
            assert is_blob(name, size) == _is_lfs(name, size, "model"), (name, size)


def test_commits_are_cut_by_number_and_by_size_and_end_with_the_manifest():
    assert batches([]) == []
    assert [len(batch) for batch in batches([{"path": str(n)} for n in range(450)])] == [200, 200, 50]
    assert [len(batch) for batch in batches([{"content": "x" * (3 << 20)}] * 3)] == [1, 1, 1]
    assert ordered(["manifest.json", "z", "a"]) == ["a", "z", "manifest.json"]


def test_small_files_are_read_again_before_they_are_committed(final):
    name, entry = "config.json", manifest.read(final)["config.json"]
    assert action_for(final, name, entry["size"], entry["sha256"])["type"] == "normal"
    (final / name).write_text((final / name).read_text().replace("1024", "1025"))
    with pytest.raises(CheckpointError, match="changed after it was staged"):
        action_for(final, name, entry["size"], entry["sha256"])
