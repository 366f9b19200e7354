"""Errors survive the way ModelScope re-raises them, and their messages help."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from modelscope_dolly import errors
from modelscope_dolly.errors import DollyError, is_whole, one_line, shown, unknown_name


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


class Raising:
    def _fail(self, *_):
        raise RuntimeError

    __eq__ = __str__ = __repr__ = __len__ = __bool__ = _fail
    __hash__ = object.__hash__


def test_a_value_is_shown_on_one_short_line_and_by_its_type_where_it_cannot_be():
    assert shown("a\nb") == repr("a\nb") and shown(np.arange(2)) == "array([0, 1])"
    assert shown(Raising()) == "<Raising>" and shown(10**5000) == "<int>"
    assert len(shown("x" * 1000)) == 200 and "\n" not in shown(np.zeros((4, 4)))
    assert unknown_name("key", Raising(), ["a"]) == "unknown key <Raising>. Allowed: a"


def test_whole_numbers_are_those_of_python_and_numpy():
    assert all(is_whole(value, 0, 5) for value in (0, 5, np.int64(3), np.uint8(5)))
    wrong = (-1, 6, True, np.bool_(True), 1.0, np.float32(1), np.arange(1), "1", None, Raising(), 10**400)
    assert not any(is_whole(value, 0, 5) for value in wrong)


def test_an_error_is_one_printable_line_whatever_it_quotes():
    assert str(DollyError("a\nb\x1b[2J\x00\ud800\u202e 日本\u3000é")) == r"a\nb\x1b[2J\x00\ud800\u202e 日本" + "\u3000é"
