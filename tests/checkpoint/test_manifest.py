"""The manifest: it covers every file, names every difference, and no damaged directory answers differently."""

import collections
import hashlib
import json
import random
import shutil

import pytest

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.errors import CheckpointError, DollyError
from modelscope_dolly.model import DollyForTextGeneration
from tests.support import layouts

QUESTION = "Name three colours of the rainbow."


@pytest.fixture
def directory(tmp_path):
    """Three files, one of them in a folder, and their manifest."""
    place = tmp_path / "files"
    (place / "folder").mkdir(parents=True)
    (place / "config.json").write_text("{}", encoding="utf-8")
    (place / "weights.bin").write_bytes(random.Random(0).randbytes(3_000_000))  # more than one block of the digest
    (place / "folder" / "note é.txt").write_text("note", encoding="utf-8")
    manifest.write(place)
    return place


def test_every_file_is_listed_with_its_size_and_sha256(directory):
    listed = manifest.read(directory)
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != manifest.NAME]
    assert len(files) == 3
    assert listed == {
        path.relative_to(directory).as_posix(): {
            "size": len(path.read_bytes()),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    assert json.loads((directory / manifest.NAME).read_bytes())["version"] == 1


def test_an_untouched_directory_has_no_problems_and_writing_again_changes_nothing(directory):
    assert manifest.differences(directory) == []
    before = (directory / manifest.NAME).read_bytes()
    manifest.write(directory)
    assert (directory / manifest.NAME).read_bytes() == before


def test_a_directory_without_manifest_has_no_problems(directory):
    (directory / manifest.NAME).unlink()
    (directory / "config.json").unlink()
    assert manifest.read(directory) is None
    assert manifest.differences(directory) == []
    assert manifest.differences(directory, ["config.json"]) == []


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _become_a_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_shorten, ("2999999 bytes", "expected 3000000")),
        (_flip, ("sha256", "expected", "content changed")),
        (lambda path: path.unlink(), ("missing", "expected 3000000 bytes")),
        (_become_a_directory, ("bytes", "expected 3000000")),
    ],
    ids=["shorter", "other content", "missing", "a directory"],
)
def test_a_problem_names_the_file_what_was_found_and_what_was_expected(directory, harm, said):
    harm(directory / "weights.bin")
    [problem] = manifest.differences(directory)
    for part in (str(directory / "weights.bin"), *said):
        assert part in problem
    assert manifest.differences(directory, ["config.json"]) == []  # the other files are as they were


def test_all_problems_are_found_at_once(directory):
    for name in ("config.json", "weights.bin"):
        (directory / name).unlink()
    (directory / "folder" / "note é.txt").write_text("nota", encoding="utf-8")
    assert len(manifest.differences(directory)) == 3


def test_a_file_that_the_manifest_does_not_list_is_a_problem_when_it_is_to_be_read(directory):
    (directory / "added.json").write_text("{}", encoding="utf-8")
    [problem] = manifest.differences(directory, ["config.json", "added.json"])
    assert "added.json" in problem and "not listed" in problem


_SHA = "0" * 64


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"{}",
        b'{"files": []}',
        b'{"files": {"a": 3}}',
        b'{"files": {"a": {"size": 1}}}',
        b'{"files": {"a": {"size": "1", "sha256": "%s"}}}' % _SHA.encode(),
        b'{"files": {"a": {"size": true, "sha256": "%s"}}}' % _SHA.encode(),
        b'{"files": {"a": {"size": 1, "sha256": "%s"}}}' % (b"g" * 64),
        b'{"files": {"a": {"size": 1, "sha256": "%s"}}}' % (b"0" * 63),
        b'{"files": {"a": {"size": 1, "sha256": %s}}}' % json.dumps(["0"] * 64).encode(),
        b'{"files": {"/etc/passwd": {"size": 1, "sha256": "%s"}}}' % _SHA.encode(),
        b'{"files": {"../outside": {"size": 1, "sha256": "%s"}}}' % _SHA.encode(),
        b'{"files": {"a\\u0000b": {"size": 1, "sha256": "%s"}}}' % _SHA.encode(),
        b'{"files": {"\\ud800": {"size": 1, "sha256": "%s"}}}' % _SHA.encode(),
    ],
)
def test_a_damaged_manifest_is_refused_and_named(directory, content):
    (directory / manifest.NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        manifest.differences(directory)


def _answer(directory):
    return DollyForTextGeneration(str(directory), device="cpu").forward(QUESTION, do_sample=False, max_new_tokens=8)


@pytest.mark.parametrize(("seed", "sharded"), [(2023, False), (2024, True)], ids=["one file", "shards"])
def test_100_damages_of_a_directory_with_manifest_give_an_error_or_the_same_answer(
    checkpoint_dir, tmp_path, seed, sharded
):
    source = layouts.shard(checkpoint_dir, tmp_path / "source") if sharded else checkpoint_dir
    rng = random.Random(seed)
    expected = _answer(source)
    outcomes = collections.Counter()
    harms = collections.Counter()
    for number in range(100):
        directory = tmp_path / str(number)
        shutil.copytree(source, directory)
        harm = layouts.damage(directory, rng)
        harms[harm.split()[0]] += 1
        try:
            answer = _answer(directory)
        except DollyError as error:
            assert str(directory) in str(error), f"{harm}: {error}"
            outcomes["refused"] += 1
        else:
            assert answer == expected, f"seed {seed}, damage {number} ({harm}) changed the answer"
            outcomes["same answer"] += 1
        shutil.rmtree(directory)
    print(f"seed {seed}: {dict(outcomes)} after {dict(harms)}")
    assert outcomes.total() == 100
    assert len(harms) == len(layouts.DAMAGES)
    assert min(outcomes["refused"], outcomes["same answer"]) > 10  # both ends of the promise were tried


def test_without_its_manifest_a_directory_gives_the_same_answer(checkpoint_dir, tmp_path):
    expected = _answer(checkpoint_dir)
    directory = shutil.copytree(checkpoint_dir, tmp_path / "copy")
    (directory / manifest.NAME).unlink()
    assert _answer(directory) == expected
