"""Files: written whole or not at all, read with errors that name the file, and the disk they need."""

from __future__ import annotations

import hashlib
import os
import random
import types

import pytest

from modelscope_dolly import files
from modelscope_dolly.errors import CheckpointError, HardwareError, SettingError
from modelscope_dolly.files import (
    LARGEST_JSON,
    check_disk,
    file_kind,
    file_sha256,
    free_disk,
    gigabytes,
    new_directory,
    new_file,
    path_of,
    read_file,
    read_json,
    remove_leftovers,
    write_atomically,
    write_json,
)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    leftovers = [".final.7.0a1b2c3d.incomplete", ".final.123456.ffffffff.incomplete", ".final.7.0a1b2c3d.old"]
    others = [
        "final.7.0a1b2c3d.incomplete",
        ".final.x.0a1b2c3d.incomplete",
        ".final.7.0a1b2c3.incomplete",
        ".finale.7.0a1b2c3d.incomplete",
        ".final.staged.7.0a1b2c3d.incomplete",
        ".final.7.0a1b2c3d.new",
    ]
    for name in leftovers + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert sorted(path.name for path in remove_leftovers(tmp_path / "final")) == sorted(leftovers[:2])
    assert (tmp_path / leftovers[2]).exists()  # the only one there is
    (tmp_path / "final").mkdir()
    assert [path.name for path in remove_leftovers(tmp_path / "final")] == leftovers[2:]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "final"])


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


def test_a_file_gets_its_name_when_the_block_ends_well(tmp_path):
    target = tmp_path / "deep" / "target"
    with new_file(target) as path:
        path.write_text("text", encoding="utf-8")
        assert not target.exists()
    assert list(target.parent.iterdir()) == [target] and target.read_text(encoding="utf-8") == "text"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_file_that_was_not_finished_is_removed(tmp_path, error):
    with pytest.raises(error), new_file(tmp_path / "target") as path:
        path.write_text("half", encoding="utf-8")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_replaces_nothing_even_if_it_came_meanwhile(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(CheckpointError, match="exists already"), new_file(target) as path:
        path.write_text("mine", encoding="utf-8")
        target.write_text("theirs", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exists already"), new_file(target):
        pytest.fail("the block must not begin")
    assert list(tmp_path.iterdir()) == [target] and target.read_text(encoding="utf-8") == "theirs"


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing"),
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[1]", "found list"),
        (b"null", "found NoneType"),
    ],
    ids=["no file", "empty", "cut", "not UTF-8", "deep", "a long number", "a list", "null"],
)
def test_read_json_says_what_is_wrong_with_the_file(tmp_path, content, said):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_read_json_of_a_directory_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)


def test_a_failed_write_keeps_the_old_text_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "note.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_what_write_json_writes_is_read_again_and_ends_in_a_newline(tmp_path):
    value = {"text": "naïve 日本語", "list": [1, 0.1, None]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert "日本語" in (text := (tmp_path / "value.json").read_text(encoding="utf-8")) and text.endswith("}\n")


def test_the_digest_of_a_file_of_several_blocks_is_that_of_its_bytes(tmp_path):
    data = random.Random(0).randbytes(3_000_000)
    (tmp_path / "weights.bin").write_bytes(data)
    assert file_sha256(tmp_path / "weights.bin") == hashlib.sha256(data).hexdigest()


def test_free_disk_is_that_of_the_nearest_directory_that_exists(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or types.SimpleNamespace(free=9))
    assert free_disk(tmp_path / "not" / "yet") == free_disk(str(tmp_path)) == 9
    assert asked == [tmp_path, tmp_path]


def test_a_disk_that_is_too_small_is_an_error_with_both_sizes_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_disk", lambda _: 3 * 10**9)
    check_disk(tmp_path, 3e9, "it")
    for remedy, end in (("", "3.00 GB are free"), ("go away", "3.00 GB are free; go away")):
        with pytest.raises(HardwareError) as caught:
            check_disk(tmp_path, 4e9, "the copy", remedy)
        assert str(caught.value) == f"{tmp_path}: the copy needs 4.00 GB of disk, {end}"


def test_gigabytes_are_decimal():
    assert gigabytes(48_000_000_000) == "48.00 GB"
    assert gigabytes(1_234_567_890) == "1.23 GB"


# What may lie in the place of a file


def _special(place, kind):
    path = place / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
    return path


@pytest.mark.parametrize("kind", ["pipe", "/dev/full", "/dev/zero", "/dev/null"])
@pytest.mark.parametrize("read", [read_file, read_json, file_sha256])
def test_a_device_or_pipe_is_refused_before_anything_is_read(tmp_path, kind, read):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: not a regular file"):
        read(_special(tmp_path, kind))


def test_a_file_that_grows_without_end_is_read_no_further_than_the_limit(tmp_path):
    (tmp_path / "large.json").write_bytes(b" " * (LARGEST_JSON + 1))
    with pytest.raises(CheckpointError, match=r"large\.json: larger than 16,777,216 bytes"):
        read_json(tmp_path / "large.json")
    (tmp_path / "large.json").write_bytes(b" " * (LARGEST_JSON - 2) + b"{}")
    assert read_json(tmp_path / "large.json") == {}


@pytest.mark.parametrize(
    ("name", "says"),
    [("x" * 300, "File name too long"), ("loop", "Too many levels"), ("a\0b", "no file"), ("\ud800", "no file")],
)
def test_a_name_that_no_file_can_have_is_an_error_of_ours(tmp_path, name, says):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for step in (file_kind, read_file, read_json, lambda path: new_directory(path).__enter__()):
        with pytest.raises(CheckpointError, match=says):
            step(tmp_path / name)


def test_kinds_of_files_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("nothing")
    names = ("file", "link", ".", "broken", "absent", "file/x", "/dev/null")
    assert [file_kind(tmp_path / name) for name in names] == ["file", "file", "directory", None, None, None, "other"]


class NoPath:
    __fspath__ = 1


NO_PATHS = [None, 5, b"x", 10**5000, ["x"], "a\0b", "\ud800", "x" * 5000, NoPath()]


@pytest.mark.parametrize("value", NO_PATHS, ids=range(len(NO_PATHS)))
def test_what_is_no_path_is_a_setting_error_that_names_the_option(value):
    with pytest.raises(SettingError, match=r"^draft is ") as caught:
        path_of("draft", value)
    assert len(str(caught.value)) < 300
