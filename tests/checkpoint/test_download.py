"""From the name of a model to a directory. Downloads themselves are in tests/test_hub.py."""

from __future__ import annotations

import re
import shlex

import pytest

from modelscope_dolly.checkpoint.download import HUB_ID, locate, repair_hint
from modelscope_dolly.errors import CheckpointError


def test_locate_returns_a_directory_as_it_is(checkpoint_dir, monkeypatch):
    assert locate(str(checkpoint_dir)) == checkpoint_dir
    monkeypatch.setenv("HOME", str(checkpoint_dir.parent))
    assert locate(f"~/{checkpoint_dir.name}") == checkpoint_dir


@pytest.mark.parametrize("name", ["nowhere", "/no/such/directory", "a/b/c", "~nobody-of-that-name/a/b"])
def test_locate_refuses_what_is_neither_a_directory_nor_a_hub_id(name):
    with pytest.raises(CheckpointError, match="no such directory, and not a hub id"):
        locate(name)


def test_an_empty_name_is_no_directory():
    with pytest.raises(CheckpointError, match="name of the model is empty"):
        locate(" ")


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("AI-ModelScope/dolly-v2-12b", True),
        ("a/b", True),
        ("_a/0.b-c_", True),
        ("a/b/c", False),
        ("a", False),
        ("a/", False),
        ("../b", False),
        ("a/.b", False),
        ("a/-b", False),
        ("a b/c", False),
        ("ä/b", False),
    ],
)
def test_a_hub_id_is_owner_and_name(name, is_id):
    assert bool(HUB_ID.fullmatch(name)) is is_id


def test_the_repair_command_of_another_directory_can_be_pasted_into_a_shell(tmp_path):
    hint = repair_hint(tmp_path / "my model's copy")
    words = shlex.split(re.search(r"modelscope download .*", hint)[0])
    assert words[words.index("--local_dir") + 1] == str(tmp_path / "my model's copy")
    assert {"--model", "--revision"} < set(words)
