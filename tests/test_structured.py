"""Answers that keep to a form: whatever the network says, they match, or are cut at their length."""

from __future__ import annotations

import itertools
import json
import re
import sys

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from modelscope_dolly.errors import SettingError
from modelscope_dolly.generation import GenerationSettings, Prompt, TextGenerator
from modelscope_dolly.structured import Forms
from tests.support.models import our_engine, random_model

PROMPTS = [Prompt("Name a colour."), Prompt("Who wrote it?", "Pepys wrote it in 1660, in 1661 and in 1662.")]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "born": {"type": "integer", "minimum": 0}},
    "required": ["name", "born"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def generator(tokenizer) -> TextGenerator:
    model = random_model(vocab_size=len(tokenizer.tokenizer) + 8, num_hidden_layers=2)  # 8 logits without a token
    engine = our_engine(model)
    return TextGenerator(engine, tokenizer, PromptLookup, forms=Forms(tokenizer, model.config.vocab_size))


def answers(generator: TextGenerator, slots: int = 3, prompts: list[Prompt] = PROMPTS, **keywords) -> list:
    chosen = GenerationSettings().updated({"seed": 3, "max_new_tokens": 60, "num_return_sequences": 3, **keywords})
    return [update for updates in generator.generate(prompts, chosen, slots) for update in updates]


@pytest.mark.parametrize("pattern", [r"[0-9]{4}-[0-9]{2}", r"(yes|no), because [a-z ]{3,12}\.", r" é+[^a]{0,5}\n", "a"])
def test_an_answer_matches_its_pattern(generator, pattern):
    found = answers(generator, regex=pattern)
    for update in found:
        assert update.finish_reason == "length" or re.fullmatch(pattern, update.text), update
    assert sum(update.finish_reason == "stop" for update in found) > 3


def test_an_answer_is_json_of_its_schema(generator):
    found = answers(generator, json_schema=PERSON, max_new_tokens=100)
    complete = [json.loads(update.text) for update in found if update.finish_reason == "stop"]
    assert len(complete) > 2
    for person in complete:
        assert set(person) == {"name", "born"} and len(person["name"]) <= 8 and person["born"] >= 0


@pytest.mark.parametrize("keywords", [{"regex": r"[a-z]{1,9} [0-9]+!"}, {"json_schema": PERSON}])
def test_slots_streams_and_speculation_change_nothing(generator, keywords):
    alone = answers(generator, 1, prompt_lookup=False, **keywords)
    assert [update.text for update in answers(generator, 6, prompt_lookup=True, **keywords)] == [
        update.text for update in alone
    ]
    chosen = GenerationSettings().updated({"seed": 3, "max_new_tokens": 60, **keywords})
    texts = [update.text for update in generator.stream(PROMPTS[:1], chosen, 1)]
    assert texts[-1] == alone[0].text and len(texts) > 3
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))


def test_with_a_draft_model_they_are_the_same(tokenizer, generator):
    from functools import partial

    from modelscope_dolly.engine.speculative.decoding import SpeculativeDecoding
    from modelscope_dolly.engine.speculative.draft_model import DraftModel

    engine = our_engine(random_model(vocab_size=len(tokenizer.tokenizer) + 8, num_hidden_layers=2))
    engine.speculation = partial(SpeculativeDecoding, draft=DraftModel(engine.net))
    drafted = TextGenerator(engine, tokenizer, forms=generator._forms)
    for keywords in ({"regex": r"[a-z]{5,30}\."}, {"json_schema": PERSON}):
        expected = [update.text for update in answers(generator, **keywords)]
        assert [update.text for update in answers(drafted, **keywords)] == expected


def test_control_tokens_are_no_part_of_a_form_but_end_it(tokenizer, generator):
    constraint = generator._forms(r"[\s\S]*")()
    allowed = set(constraint.allowed().nonzero()[:, 0].tolist())
    assert len(constraint.allowed()) == generator.engine.net.config.vocab_size
    assert allowed & tokenizer.special_ids == tokenizer.control.stop
    assert all(tokenizer.token_bytes(id) for id in allowed - tokenizer.control.stop)
    assert not {id for id in generator._forms("ab")().allowed().nonzero()[:, 0].tolist()} & tokenizer.control.stop


def test_a_copy_goes_its_own_way(tokenizer, generator):
    constraint = generator._forms("(ab|cd)")()
    twin = constraint.copy()
    [first] = tokenizer.encode_text("a")
    twin.advance(first)
    assert bool(constraint.allowed()[tokenizer.encode_text("c")[0]]) and not bool(twin.allowed()[first])
    for id in (*tokenizer.encode_text("b"), tokenizer.control.end, 5):
        twin.advance(id)
    assert set(twin.allowed().nonzero()[:, 0].tolist()) == tokenizer.control.stop


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"regex": "(a"}, "regex: error: unclosed group"),
        ({"regex": r"(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": r"[^\s\S]"}, "regex: no text fits it"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, 'json_schema: Unimplemented keys: ["uniqueItems"]'),
        ({"json_schema": {"type": "nothing"}}, "json_schema: "),
        ({"json_schema": {"$ref": "http://x/y"}}, "json_schema: Resource 'http://x/y' is not present"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema: not JSON"),
        ({"json_schema": {"type": "string", "maxLength": 10**30}}, "json_schema: "),
        ({"regex": "((a{1,1000}){1,1000}){1,1000}" * 50}, "regex: "),
    ],
)
def test_a_form_that_cannot_be_kept_is_one_line_with_the_reason(generator, keywords, reason):
    with pytest.raises(SettingError) as caught:
        answers(generator, **keywords)
    assert reason in str(caught.value) and len(str(caught.value)) < 500


def test_forms_exclude_what_could_break_them():
    for keywords in (
        {"regex": "a", "json_schema": {}}, {"regex": "a", "choices": ["a"]}, {"regex": "a", "stop": "b"},
        {"json_schema": {}, "min_new_tokens": 3}, {"regex": "a", "bad_words": ["a"]}, {"choices": ["a"], "stop": "a"},
        {"choices": ["a", "b"], "num_return_sequences": 2},
    ):  # fmt: skip
        with pytest.raises(SettingError, match="beside"):
            GenerationSettings().updated(keywords)


def test_without_llguidance_the_message_has_the_command(generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SettingError, match=r"regex and json_schema need llguidance .*pip install 'modelscope-dolly\["):
        answers(generator, regex="a")


JSON_SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"type": "number", "minimum": -2, "maximum": 3},
            {"type": "string", "maxLength": 5}, {"enum": ["a", 1, None, "é\n"]}, {"const": {"a": [1]}},
            {"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": "integer", "minimum": 10, "maximum": 99},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda properties, some: {
                "type": "object", "properties": properties, "required": sorted(properties)[:some],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b c", 'q"', "ü"]), inner, max_size=3), st.integers(0, 3),
        ),
    ),
    max_leaves=4,
)  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(JSON_SCHEMAS, st.integers(0, 1000))
def test_what_comes_out_is_valid_or_cut(generator, schema, seed):
    for update in answers(generator, prompts=PROMPTS[:1], json_schema=schema, seed=seed, num_return_sequences=2):
        if update.finish_reason == "stop":
            jsonschema.validate(json.loads(update.text), schema)
        else:
            assert update.finish_reason == "length" and update.new_tokens == 60


PATTERNS = st.recursive(
    st.sampled_from(["a", "[0-9]", r"\.", "é", "[^b]", "yes", r"\s", "(x|yz)"]),
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("({}|{})".format, inner, inner),
        st.builds("({}){{{},4}}".format, inner, st.integers(0, 3)),
        st.builds("({})?".format, inner),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=25)
@given(PATTERNS, st.integers(0, 1000))
def test_what_comes_out_matches_or_is_cut(generator, pattern, seed):
    for update in answers(generator, prompts=PROMPTS[:1], regex=pattern, seed=seed, num_return_sequences=2):
        assert update.finish_reason == "length" or re.fullmatch(pattern, update.text), (update, pattern)
