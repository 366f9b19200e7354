"""The settings of a publish: what a recipe may say, and the command line that says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelscope_dolly.errors import SettingError
from train.publishing.publish_settings import PublishSettings


def test_a_recipe_names_one_host_or_a_list_and_nothing_else():
    values = {"model_id": "me/x", "revision": "v1"}
    assert PublishSettings.from_recipe({**values, "trust_storage_host": "a"}).trust_storage_host == ("a",)
    assert PublishSettings.from_recipe({**values, "trust_storage_host": ["a", "b"]}).trust_storage_host == ("a", "b")
    for name, bad in (("trust_storage_host", 5), ("prune", "yes"), ("visibility", []), ("license", "a b")):
        with pytest.raises(SettingError, match=name):
            PublishSettings.from_recipe({**values, name: bad})


def test_the_command_that_resumes_has_every_setting():
    settings = PublishSettings("me/x", "v1.0.0", "public", True, True, ("lfs.example",), "mit")
    assert settings.command(Path("runs/my run/final")) == (
        "python -m train.publish 'runs/my run/final' --model-id me/x --revision v1.0.0 --visibility public --prune "
        "--verify-download --license mit --trust-storage-host lfs.example"
    )
