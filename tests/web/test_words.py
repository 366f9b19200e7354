"""The texts of the web page: complete in both languages, and the examples are ours."""

from __future__ import annotations

import string

import pytest

from modelscope_dolly.web.words import EXAMPLES, LANGUAGES, WORDS, preferred_language


def test_both_languages_have_the_same_texts_with_the_same_gaps():
    def gaps(text: str) -> list[str]:
        return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)

    english, chinese = ({key: gaps(text) for key, text in WORDS[language].items()} for language in ("en", "zh"))
    assert set(WORDS) == set(LANGUAGES) and english == chinese
    assert all(text.strip() for words in WORDS.values() for text in words.values())


def test_chinese_texts_are_chinese():
    bare = {key for key, text in WORDS["zh"].items() if not any("\u4e00" <= c <= "\u9fff" for c in text)}
    assert bare == {"top_p", "top_k"}


def test_limitations_have_as_many_points_in_both_languages():
    assert len({words["limits_text"].count("\n- ") for words in WORDS.values()}) == 1


def test_examples_are_of_seven_kinds_and_among_the_records_of_the_nano_recipe(records):
    by_question = {(record["instruction"], record["context"]): record["category"] for record in records}
    kinds = [by_question[question, context] for _, _, question, context in EXAMPLES]
    assert set(kinds) == set(by_question.values()) - {"general_qa"} and len(kinds) == len(set(kinds)) == 7


@pytest.mark.parametrize(
    ("header", "language"),
    [
        (None, "en"), ("", "en"), ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,en;q=0.9,zh-CN;q=0.8", "en"),
        ("fr-FR, zh-TW;q=0.8, en;q=0.5", "zh"), ("de", "en"), ("ZH-hans", "zh"),
    ],
)  # fmt: skip
def test_the_language_is_the_first_of_the_browsers_that_we_have(header, language):
    assert preferred_language(header) == language
