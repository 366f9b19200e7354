"""Errors survive the way ModelScope re-raises them, and their messages help."""

from __future__ import annotations

import inspect

import pytest

from modelscope_dolly import errors
from modelscope_dolly.errors import DollyError, one_line, unknown_name


def all_subclasses(base: type) -> list[type]:
    return [base, *(deeper for sub in base.__subclasses__() for deeper in all_subclasses(sub))]


def our_classes() -> list[type]:
    defined = [item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__]
    return sorted({*defined, *all_subclasses(DollyError)}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", our_classes())
def test_every_error_is_a_dolly_error_made_of_one_string(cls):
    assert issubclass(cls, DollyError)
    original = cls("top_p is 2, it must be a number in (0, 1]")
    assert str(original) == "top_p is 2, it must be a number in (0, 1]"
    again = type(original)(f"DollyTextGenerationPipeline: {original}")  # what modelscope.utils.registry does
    assert type(again) is cls
    assert str(again) == f"DollyTextGenerationPipeline: {original}"
    assert again.args == (str(again),)


def test_all_subclasses_are_found():
    assert {cls.__name__ for cls in our_classes()} >= {
        "DollyError",
        "CheckpointError",
        "PromptError",
        "SettingError",
        "HardwareError",
    }


def test_unknown_name_offers_the_nearest_one_and_all_in_order():
    message = unknown_name("keyword", "max_tokens", ("top_p", "max_new_tokens"))
    assert message == "unknown keyword 'max_tokens'. Did you mean 'max_new_tokens'? Allowed: max_new_tokens, top_p"


def test_unknown_name_guesses_nothing_when_nothing_is_near():
    assert unknown_name("keyword", "zzz", ["top_p"]) == "unknown keyword 'zzz'. Allowed: top_p"


def test_unknown_name_takes_any_iterable():
    assert unknown_name("key", "b", (name for name in "ca")).endswith("Allowed: a, c")


def test_one_line_folds_white_space():
    assert one_line(ValueError("first\n  second\tthird\n")) == "first second third"
    assert one_line(KeyError()) == ""


@pytest.mark.parametrize("length", [40, 500])
def test_one_line_is_bounded_and_ends_in_an_ellipsis_when_cut(length):
    text = "word " * 500
    shown = one_line(ValueError(text), length)
    assert len(shown) == length
    assert shown == text[: length - 3] + "..."
    assert one_line(ValueError("short"), length) == "short"
