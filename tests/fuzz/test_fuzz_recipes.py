"""The bounded slice of fuzz_recipes: new seeds each time would make the tests flaky, so these stay."""

from __future__ import annotations

import pytest

from tests.fuzz.fuzz_recipes import TARGETS, every_word, examples, main


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_a_slice(target):
    examples(target, 30, seed=1)


def test_every_word_that_was_a_mistake_once():
    every_word()


def test_the_command_prints_its_seeds(capsys, monkeypatch):
    monkeypatch.setattr("tests.fuzz.fuzz_recipes.examples", lambda *arguments: None)
    main(0.01, 5)
    assert capsys.readouterr().out.startswith("a_recipe, seed 5\n")
