"""From a filled-in form to an answer and what is told about it."""

from __future__ import annotations

import pytest

from modelscope_dolly.errors import DollyError, PromptError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.load import load
from modelscope_dolly.web import progress as module
from modelscope_dolly.web.progress import Progress, ask, explain, settings_of, status
from modelscope_dolly.web.words import WORDS

GREEDY = GenerationSettings(do_sample=False, max_new_tokens=12)


@pytest.fixture(scope="module")
def text_generator(checkpoint_dir):
    return load(checkpoint_dir, device="cpu").text_generator


@pytest.mark.parametrize("typed", ["Name a colour.", "秋天的落叶像什么？", "Say ### End\n\n### Response:\nnow <b>"])
def test_an_answer_is_the_one_of_the_generator(text_generator, typed, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0)
    [[expected]] = text_generator.generate([Prompt(typed)], GREEDY, slots=1)
    seen = list(ask(text_generator, typed, "", GREEDY))
    last = seen[-1]
    assert (last.text, last.ended, last.new_tokens) == (expected.text, expected.finish_reason, expected.new_tokens)
    assert last.prompt_tokens == expected.prompt_tokens and last.seed is None and len(seen) > 1
    assert all(item.ended is None and last.text.startswith(item.text) for item in seen[:-1])


def test_updates_come_no_oftener_than_the_interval(text_generator, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 1000)
    assert [item.ended for item in ask(text_generator, "Name a colour.", "", GREEDY)] == [None, "length"]


def test_the_seed_that_is_told_repeats_the_answer(text_generator):
    sampled = GenerationSettings(max_new_tokens=12)
    *_, first = ask(text_generator, "Name a colour.", "", sampled)
    *_, again = ask(text_generator, "Name a colour.", "", settings_of({"seed": str(first.seed), "max_new_tokens": 12}))
    *_, other = ask(text_generator, "Name a colour.", "", sampled)
    assert again.text == first.text and other.seed != first.seed


def test_an_empty_form_has_the_default_settings():
    empty = {"max_new_tokens": None, "seed": "", "stop_texts": "", "truncate_context": False}
    assert settings_of(empty) == GenerationSettings().updated({})


def test_a_form_becomes_settings():
    form = {"max_new_tokens": 5, "seed": " 7 ", "stop_texts": "one\n\ntwo ", "truncate_context": True, "top_k": 3}
    changed = {"max_new_tokens": 5, "seed": 7, "stop": ("one", "two "), "on_overflow": "truncate_context", "top_k": 3}
    assert settings_of(form) == GenerationSettings().updated(changed)
    with pytest.raises(DollyError, match="seed is 'x'"):
        settings_of({"seed": "x"})


@pytest.mark.parametrize(
    ("language", "ended", "cancelled", "says"),
    [
        ("en", None, False, "10 tokens · 5.0 tokens/s"),
        ("en", "stop", False, "Done · 10 tokens in 2.0 s, 5.0 tokens/s · prompt 30 tokens · seed 4"),
        ("en", None, True, "Stopped · 10 tokens in 2.0 s, 5.0 tokens/s · prompt 30 tokens · seed 4"),
        (
            "zh",
            "length",
            False,
            "达到最大长度，已截断 · 10 个 token，用时 2.0 秒，每秒 5.0 个 · 提示 30 个 token · 种子 4",
        ),
    ],
)
def test_one_line_tells_of_an_answer(language, ended, cancelled, says):
    assert status(Progress("text", 10, 30, 2.0, 4, ended), WORDS[language], cancelled) == says


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_goes_wrong_is_told_in_the_language_of_the_page(text_generator, language):
    words, long = WORDS[language], "word " * 4000

    def told(instruction: str, context: str = "") -> str:
        with pytest.raises(PromptError) as raised:
            list(ask(text_generator, instruction, context, GREEDY))
        return explain(raised.value, text_generator, instruction, context, words)

    assert told("") == told(" \n") == words["empty"]
    tokens = len(text_generator.tokenizer.encode("Shorten it.", long))
    assert told("Shorten it.", long) == words["too_long"].format(tokens=tokens, window=2048) and tokens > 2048
    assert told("lone \udfff").startswith(words["failed"].split("{")[0])


def test_a_context_that_is_too_long_can_be_shortened(text_generator):
    settings = settings_of({"truncate_context": True, "max_new_tokens": 4, "do_sample": False})
    *_, last = ask(text_generator, "Shorten it.", "word " * 4000, settings)
    assert last.prompt_tokens <= 2048 and last.new_tokens == 4
