"""The YAML of a recipe: text, numbers, true, false, null, lists and maps; or one line that says where."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.errors import SettingError
from train.recipe_file import MOST_BYTES, MOST_DEPTH, parse, problem, read_recipe, shown

VALUES = {
    "0": 0,
    "-7": -7,
    "2048": 2048,
    "1.5": 1.5,
    "5e-6": 5e-6,
    "1E3": 1000.0,
    "true": True,
    "false": False,
    "null": None,
    "~": None,
    "": None,
    "two words": "two words",
    "'5'": "5",
    '"true"': "true",
    "[1, [a, 2.0], {}]": [1, ["a", 2.0], {}],
    "{r: 16, x: {y: null}}": {"r": 16, "x": {"y": None}},
    "a: 1\nb:\n  - c\n  - d: 2": {"a": 1, "b": ["c", {"d": 2}]},
    # What YAML 1.1 reads as something else.
    "2026-11-21": "2026-11-21",
    "2026-11-21T10:00:00Z": "2026-11-21T10:00:00Z",
    "9999-99-99": "9999-99-99",
    "0x_": "0x_",
    "0x10": "0x10",
    "0123": "0123",
    "1:30": "1:30",
    "1_000": "1_000",
    "yes": "yes",
    "no": "no",
    "on": "on",
    ".inf": ".inf",
    ".nan": ".nan",
    "0b_": "0b_",
    "<<": "<<",
    "=": "=",
    "+5": "+5",
    ".5": ".5",
    "5.": "5.",
    "True": "True",
}


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_values_are_what_json_has_and_everything_else_is_text(text, value):
    assert parse(text) == value and type(parse(text)) is type(value)


REFUSED = {
    "!!int foo": "tags",
    "!!bool foo": "tags",
    "!!timestamp foo": "tags",
    "!!python/name:os.system x": "tags",
    "!!binary =": "tags",
    "! x": "tags",
    "a: !!set {b}": "line 1: tags",
    "a: &x 1": "anchors and aliases",
    "*x": "aliases",
    "a: 1\nb: 2\na: 3": "line 3: the key 'a' is there twice",
    "? [a]\n: b": "a key must be a word",
    "[" * 3000: "more than",
    "{a: " * 3000: "more than",
    "- " * 3000: "more than",
    "9" * 5000: "a number of 5000 characters",
    "1e999": "digits",
    "a\n---\nb": "a second document",
    '"\\0"': "control characters",
    '"\\ud800"': "control characters",
    "a: [": "",
    '"': "",
    "\t- a\n b": "",
    "%YAML 3.0\n---\na": "",
    "a: |\n  two\n  lines": "control characters",
    "\x00": "",
    "a: b: c": "",
    "-" + "9" * 5000: "a number of 5001 characters",
    "1." + "9" * 5000: "a number of 5002 characters",
    "@a": "",
    "`a": "",
}


@pytest.mark.parametrize(("text", "says"), REFUSED.items(), ids=lambda text: text[:20])
def test_what_a_recipe_cannot_have_is_one_line(text, says):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


simple = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20).filter(lambda text: problem(text) is None)
plain = st.recursive(
    simple | words, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=10
)


@given(plain)
def test_json_is_read_as_json_is(value):
    assert parse(json.dumps(value, ensure_ascii=False)) == value


@given(st.dictionaries(words, words | st.booleans() | st.none() | st.integers(-(10**30), 10**30), max_size=4))
def test_what_pyyaml_writes_is_read_back(value):
    assert parse(yaml.safe_dump(value, allow_unicode=True, width=10_000)) == value


@settings(deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from([*VALUES, *REFUSED, ": ", "\n", "- ", "  ", ",", "}", "]", "#"]),
                                       max_size=8).map("".join))  # fmt: skip
def test_any_text_is_a_value_or_one_line(text):
    try:
        value = parse(text)
    except ValueError as error:
        assert "\n" not in str(error) and type(error).__name__ in ("ValueError", "_Refused")
    else:
        assert problem(value) is None and json.loads(json.dumps(value)) == value


def test_depth_and_size_have_limits(tmp_path):
    assert problem(parse("[" * MOST_DEPTH + "]" * MOST_DEPTH)) is None
    (tmp_path / "records.jsonl").write_text('{"instruction": "a"}\n' * (MOST_BYTES // 20))
    with pytest.raises(SettingError, match=r"records\.jsonl: not a recipe: larger than .* is it the dataset\?"):
        read_recipe(tmp_path / "records.jsonl")
    with pytest.raises(SettingError, match="/dev/zero: not a recipe: larger"):
        read_recipe("/dev/zero")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"a: \xff", "not YAML of a recipe"),
        (b"", "found nothing"),
        (b"7", "a number"),
        (b"text", "found text"),
        (b"true", "found true"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, data, says):
    (tmp_path / "recipe.yaml").write_bytes(data)
    with pytest.raises(SettingError, match=says) as error:
        read_recipe(tmp_path / "recipe.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}: ") and "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfmodel: a")
    assert read_recipe(tmp_path / "recipe.yaml") == {"model": "a"}


def test_what_is_shown_is_short_and_on_one_line():
    loop: list = []
    loop.append(loop)
    for value in ("x" * 10**5, "a\nb", 10**5000, {"a": "\ud800"}, loop, [[[]]] * 1000):
        assert len(shown(value)) <= 80 and "\n" not in shown(value) and shown(value).encode("utf-8")


class Strange:
    pass


BAD = (Strange(), {1: 2}, {"a": {2: 3}}, b"x", float("inf"), 10**5000, "\0", ["\ud800"], {"\n"})


def test_what_a_program_may_not_pass_is_named():
    assert all(isinstance(problem(value), str) for value in BAD)
