"""Scores of given answers, and answers that are chosen, against transformers' own log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.errors import PromptError, SettingError
from modelscope_dolly.generation import GenerationSettings, Prompt, TextGenerator
from tests.support.models import our_engine

PROMPTS = [Prompt("Name a colour."), Prompt("Who wrote it?", "Pepys wrote it. " * 150), Prompt("Is it late?")]
ANSWERS = ["Red, or perhaps a dark and warm green.", "Samuel Pepys", "y"]


@pytest.fixture(scope="module")
def generator(oracle, tokenizer) -> TextGenerator:
    return TextGenerator(our_engine(oracle), tokenizer)


def reference(oracle, ids: list[int], begin: int) -> list[float]:
    with torch.inference_mode():
        logs = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logs[place - 1, ids[place]]) for place in range(begin, len(ids))]


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("slots", [1, 3])
def test_scores_are_those_of_transformers(oracle, generator, end, slots):
    texts = [generator.encode_answer(*pair, end) for pair in zip(PROMPTS, ANSWERS, strict=True)]
    assert [ids[begin:][-1] == generator.tokenizer.control.end for ids, begin in texts] == [end] * 3
    scores = generator.scores(texts, top=2, slots=slots)
    for (ids, begin), score in zip(texts, scores, strict=True):
        assert [one.id for one in score] == ids[begin:] and all(len(one.top) == 2 for one in score)
        assert [one.logprob for one in score] == pytest.approx(reference(oracle, ids, begin), abs=2e-4)
    assert generator.score(*texts[0], top=2) == scores[0]


def test_a_score_is_the_same_beside_running_answers(generator):
    ids, begin = generator.encode_answer(PROMPTS[1], ANSWERS[0])
    alone = generator.score(ids, begin)
    answers = generator.stream(PROMPTS, GenerationSettings().updated({"max_new_tokens": 30, "seed": 1}), 3)
    next(answers)
    beside = generator.score(ids, begin)  # read in chunks between the steps of the others
    assert [one.logprob for one in beside] == pytest.approx([one.logprob for one in alone], abs=1e-4)
    answers.close()


def test_what_cannot_be_scored_is_one_line(generator):
    for ids, begin in (([1, 2], 0), ([1, 2], 2), ([], 0)):
        with pytest.raises(PromptError, match="cannot be scored"):
            generator.score(ids, begin)
    with pytest.raises(PromptError, match="do not fit the window of 2048"):
        generator.score([1] * 2049, 5)
    with pytest.raises(SettingError, match="top is 21, it must be a whole number, 0 to 20"):
        generator.score([1, 2], 1, top=21)
    with pytest.raises(PromptError, match="the answer is empty"):
        generator.encode_answer(PROMPTS[0], "")
    assert len(generator.score([1] * 2048, 2040)) == 8


def chosen(generator, slots: int = 2, **keywords) -> list:
    settings = GenerationSettings().updated({"choices": ["yes", "no, it is not", "perhaps"], **keywords})
    return [update for [update] in generator.generate(PROMPTS, settings, slots)]


def test_the_choice_is_the_likeliest_by_its_mean(oracle, generator):
    for update, prompt in zip(chosen(generator, logprobs=1), PROMPTS, strict=True):
        means = []
        for choice in update.choices:
            ids, begin = generator.encode_answer(prompt, choice.text)
            means.append(sum(reference(oracle, ids, begin)) / (len(ids) - begin))
        assert [choice.logprob for choice in update.choices] == pytest.approx(means, abs=2e-4)
        best = max(update.choices, key=lambda choice: choice.logprob)
        assert (update.text, update.finish_reason) == (best.text, "stop")
        assert [one.id for one in update.logprobs] == generator.tokenizer.encode_text(best.text)
        assert math.fsum(choice.probability for choice in update.choices) == pytest.approx(1)
        assert best.probability == max(choice.probability for choice in update.choices)


def test_choices_do_not_depend_on_slots_or_order(generator):
    first = chosen(generator, slots=1)
    assert chosen(generator, slots=9) == first
    turned = chosen(generator, choices=["perhaps", "no, it is not", "yes"])
    for update, other in zip(first, turned, strict=True):
        assert update.text == other.text
        assert [choice.logprob for choice in other.choices[::-1]] == pytest.approx(
            [choice.logprob for choice in update.choices], abs=1e-5
        )
    assert all(update.logprobs is None for update in first)


def test_a_prompt_that_leaves_no_room_for_a_choice_is_an_error(generator):
    size = len(generator.tokenizer.encode(PROMPTS[0].instruction))
    longest = len(generator.tokenizer.encode_text("no, it is not"))
    engine = generator.engine
    narrow = TextGenerator(Engine(engine.net, engine.device, size + longest - 1), generator.tokenizer)
    settings = GenerationSettings().updated({"choices": ["yes", "no, it is not"], "max_new_tokens": 1})
    with pytest.raises(PromptError, match=f"choices has {longest} tokens, and the window leaves {longest - 1} for it"):
        narrow.generate(PROMPTS[:1], settings, 1)
    assert len(generator.generate(PROMPTS[:1], settings, 1)) == 1  # max_new_tokens is for what is drawn
