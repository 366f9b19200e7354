"""From inputs and keywords to answers: settings, the window, shortened contexts, and updates."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.logits_processors import penalize
from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from modelscope_dolly.errors import PromptError, SettingError, shown
from modelscope_dolly.generation import GenerationSettings, Prompt, TextGenerator, parse_input
from modelscope_dolly.load import load
from modelscope_dolly.prompt import INTRO, DollyTokenizer
from tests.support.models import our_engine

GREEDY = {"do_sample": False, "max_new_tokens": 24}
NAMES = [field.name for field in dataclasses.fields(GenerationSettings)]


def chosen(**keywords) -> GenerationSettings:
    return GenerationSettings().updated(keywords)


@pytest.fixture(scope="module")
def generator(oracle, tokenizer) -> TextGenerator:
    return TextGenerator(our_engine(oracle), tokenizer, PromptLookup, lookup_by_default=True)


def narrow(generator: TextGenerator, window: int) -> TextGenerator:
    """The same network with a window that short texts overflow."""
    return TextGenerator(Engine(generator.engine.net, generator.engine.device, window), generator.tokenizer)


@pytest.fixture
def warnings(monkeypatch) -> list[logging.LogRecord]:
    """What our logger is told; caplog hears nothing once modelscope has set its logger not to propagate."""
    told, handler = [], logging.Handler()
    handler.emit = told.append
    monkeypatch.setattr(logging.getLogger("modelscope.dolly"), "handlers", [handler])
    return told


@pytest.fixture(scope="module")
def prompts(records) -> list[Prompt]:
    return [Prompt(record["instruction"], record["context"]) for record in records[:10]]


BAD_VALUES = [
    ("max_new_tokens", [0, -1, 1.5, "8", True, None], "a whole number of at least 1"),
    ("do_sample", [1, "yes", None], "True or False"),
    ("temperature", [0, -1.0, float("nan"), float("inf"), 10**400, "1", True, None], "a number above 0"),
    ("top_k", [-1, 2.0, "3", False], "a whole number of at least 0"),
    ("top_p", [0, 1.01, -0.5, float("nan"), "0.9", True, None], "a number in (0, 1]"),
    ("repetition_penalty", [0, -2, 1e-300, 1e-7, 1e7, float("inf"), "1", None], "above 0, from 1e-06 to 1e+06"),
    ("num_return_sequences", [0, 1.0, None], "a whole number of at least 1"),
    ("seed", [-1, 0.5, 2**32, "1", True], "None or a whole number, 0 to 4294967295"),
    ("stop", ["", ["a", ""], [1], 5, {"a": 1}], "a text or a list of texts, none empty"),
    ("return_full_text", [0, "no", None], "True or False"),
    ("on_overflow", ["truncate", None, []], "one of error, truncate_context"),
    ("prompt_lookup", ["on", 1, None, 0.5], "True, False or 'auto'"),
    ("logprobs", [-1, 21, 1.0, True, "3"], "None or a whole number, 0 to 20"),
    ("min_p", [-0.1, 1.1, float("nan"), "0.1", True, None], "a number in [0, 1]"),
    ("presence_penalty", [-2.1, 2.1, float("nan"), "1", None], "a number, -2 to 2"),
    ("frequency_penalty", [-2.1, 2.1, float("inf"), False, None], "a number, -2 to 2"),
    ("logit_bias", [5, [1], {"a": 1}, {-1: 1}, {1: 101}, {1: "x"}, {True: 1}], "a dict of token ids and numbers, -100"),
    ("bad_words", ["", ["a", ""], [1], 5, ["\ud83d"]], "a text or a list of texts, none empty"),
    ("min_new_tokens", [-1, 1.5, "8", True, None], "a whole number of at least 0"),
    ("choices", ["", ["a", ""], ["a", "a"], 5, ["\ud83d"], {"a": 1}], "a list of texts, none empty and none twice"),
    ("regex", ["", 5, ["a"], "\ud83d"], "None or a regular expression that is not empty"),
    ("json_schema", [5, "{}", [], True], "None or a JSON schema as a dict"),
]


@pytest.mark.parametrize(("name", "values", "allowed"), BAD_VALUES, ids=[row[0] for row in BAD_VALUES])
def test_a_bad_value_is_one_error_that_names_keyword_value_and_what_is_allowed(name, values, allowed):
    for value in values:
        with pytest.raises(SettingError) as caught:
            chosen(**{name: value})
        assert str(caught.value).startswith(f"{name} is {shown(value)}, it must be {allowed}"), value
        assert str(caught.value).count("it must be") == 1
    assert [row[0] for row in BAD_VALUES] == NAMES  # so every keyword is tested here


def test_several_problems_are_reported_together():
    with pytest.raises(SettingError) as caught:
        chosen(top_p=2, temperature=-1, seed="x")
    named = [message.split(" is ")[0] for message in str(caught.value).split("; ")]
    assert named == ["temperature", "top_p", "seed"]
    with pytest.raises(SettingError, match="do_sample is False, it must be True for several sequences"):
        chosen(do_sample=False, num_return_sequences=2)


def test_an_unknown_keyword_suggests_the_nearest_one():
    for name, near in (("max_tokens", "max_new_tokens"), ("topp", "top_p")):
        with pytest.raises(SettingError, match=f"unknown keyword '{name}'. Did you mean '{near}'"):
            chosen(**{name: 1})


def test_stop_is_one_text_or_several():
    for stop, stored in (("\n", ("\n",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), (None, ()), ([], ())):
        assert chosen(stop=stop).stop == stored


def test_settings_build_on_settings():
    base = chosen(temperature=0.5, top_k=None)
    assert (base.temperature, base.top_k, base.updated({"top_p": 1}).temperature) == (0.5, 0, 0.5)
    assert chosen() == GenerationSettings()


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3))


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), ANYTHING))
def test_any_keywords_are_settings_or_a_setting_error(keywords):
    try:
        changed = chosen(**keywords)
    except SettingError as error:
        assert any(f"{name} is " in str(error) or repr(name) in str(error) for name in keywords)
    else:
        assert set(keywords) <= set(NAMES)
        assert changed == changed.updated({})


def test_an_input_is_a_text_or_a_dict():
    for value in ("Why?", {"instruction": "Why?"}, {"text": "Why?"}, {"instruction": "Why?", "context": None}):
        assert parse_input(value) == Prompt("Why?")
    assert parse_input({"instruction": "Why?", "context": "So."}) == Prompt("Why?", "So.")
    record = {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"}
    assert parse_input(record) == Prompt("Why?", "")
    assert parse_input({"instruction": "Why?", "id": 7}, ignore_unknown=True) == Prompt("Why?")  # a data set's row
    turns = [{"role": "system", "content": "So."}, {"role": "user", "content": "Why?"}]
    assert parse_input({"messages": turns}) == Prompt("Why?", "So.")


def test_a_context_may_come_beside_the_input_but_not_twice():
    for value in (
        "Why?",
        {"text": "Why?"},
        {"text": "Why?", "context": ""},
        {"messages": [{"role": "user", "content": "Why?"}]},
    ):
        assert parse_input(value, context="So.") == Prompt("Why?", "So.")
    turns = [{"role": "system", "content": "So."}, {"role": "user", "content": "Why?"}]
    twice = [
        ({"text": "Why?", "context": "So."}, "No."),
        ({"messages": turns}, "No."),
        ({"messages": turns, "context": "No."}, None),
    ]
    for value, context in twice:
        with pytest.raises(PromptError, match="there are two contexts"):
            parse_input(value, context=context)
    with pytest.raises(PromptError, match="context must be a string, found int"):
        parse_input("Why?", context=5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "found int"),
        (None, "found NoneType"),
        ("  ", "instruction is empty"),
        ({}, "either 'instruction' or 'text', found keys: none"),
        ({"text": "a", "instruction": "b"}, "either 'instruction' or 'text', found keys: text, instruction"),
        ({"text": "a", "messages": []}, "found keys: text, messages; a conversation is a dict with 'messages'"),
        ({"messages": "hello"}, "messages must be a list of messages, found str"),
        ({"instruction": "a", "contxt": "b"}, "unknown input key 'contxt'. Did you mean 'context'"),
        ({"instruction": "a", 5: "b"}, "unknown input key 5"),
        ({"instruction": None}, "instruction must be a string, found NoneType"),
        ({"instruction": "a", "context": 5}, "context must be a string, found int"),
        ({"instruction": "a", "context": "\ud83d"}, "context is not valid Unicode"),
    ],
)
def test_a_wrong_input_is_a_prompt_error_that_says_what_is_wrong(value, message):
    with pytest.raises(PromptError, match=message):
        parse_input(value)


def test_max_new_tokens_is_cut_to_the_window_with_a_warning(generator, warnings):
    ids = generator.tokenizer.encode("What is dew?")
    short = narrow(generator, len(ids) + 5)
    for wanted, room in ((4, 4), (5, 5), (6, 5), (2000, 5)):
        warnings.clear()
        assert short.fit(Prompt("What is dew?"), chosen(max_new_tokens=wanted)) == (ids, room)
        cut = f"max_new_tokens cut from {wanted} to 5: the prompt has {len(ids)} tokens, the window {len(ids) + 5}"
        assert [record.getMessage() for record in warnings] == [cut] * (wanted > 5)
        assert all((r.name, r.levelno) == ("modelscope.dolly", logging.WARNING) for r in warnings)


@pytest.mark.parametrize("context", [None, "Dew is water."])
@pytest.mark.parametrize("over", [0, 1, 50])
def test_a_prompt_that_leaves_no_room_is_an_error_with_the_counts(generator, context, over):
    size = len(generator.tokenizer.encode("What is dew?", context))
    with pytest.raises(PromptError) as caught:
        narrow(generator, size - over).fit(Prompt("What is dew?", context), chosen())
    message = str(caught.value)
    assert f"the prompt has {size} tokens and the window {size - over}" in message
    assert ("shorten the context" in message) == ("truncate_context" in message) == bool(context)


def kept_context(tokenizer: DollyTokenizer, ids: list[int], prompt: Prompt) -> str:
    """The context in prompt ids, after checking that all else is there."""
    control = tokenizer.control
    assert [i for i in ids if i in tokenizer.special_ids] == [control.instruction, control.response]
    begin = ids.index(control.instruction)
    assert tokenizer.decode(ids[:begin]) == f"{INTRO}\n\n" and ids[-1] == control.response
    body = tokenizer.decode(ids[begin + 1 : -1])
    head = f"\n{prompt.instruction}\n\nInput:\n"
    assert body.startswith(head) and body.endswith("\n\n")
    return body.removeprefix(head).removesuffix("\n\n")


CONTEXTS = {
    "words": "The brook ran over the stones, and the water was cold and clear as the autumn morning. " * 12,
    "long words": "internationalisation" * 40,
    "scripts": "漢字かな交じり文🙂👩\u200d👧 " * 20,
    "white space": "a  \n\n    b\t" * 60,
    "typed keys": "### End\n\n### Response:\n<|endoftext|> and so on. " * 15,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("wanted", [16, 60])
def test_a_context_that_is_too_long_keeps_its_longest_beginning(generator, warnings, context, wanted):
    prompt, tokenizer, window = Prompt("What is dew?", context), generator.tokenizer, 200
    options = chosen(max_new_tokens=wanted, on_overflow="truncate_context")
    ids, room = narrow(generator, window).fit(prompt, options)
    kept = kept_context(tokenizer, ids, prompt)
    assert room == wanted and len(ids) + wanted <= window and kept and context.startswith(kept)
    sizes = [len(tokenizer.encode(prompt.instruction, context[:end])) for end in range(1, len(context) + 1)]
    longest = max(end for end, size in enumerate(sizes, start=1) if size + wanted <= window)
    # Not always to the character: a few characters more can be fewer tokens, where they complete a word.
    assert longest - len(kept) <= 6
    assert sizes[len(kept)] + wanted > window  # one more character does not fit
    [warning] = warnings
    assert warning.getMessage().startswith(f"context cut from {len(context)} to {len(kept)} characters")


def test_a_context_that_fits_is_not_shortened(generator, warnings):
    prompt = Prompt("What is dew?", CONTEXTS["words"])
    whole = generator.tokenizer.encode(prompt.instruction, prompt.context)
    exact = narrow(generator, len(whole) + 30)
    assert exact.fit(prompt, chosen(max_new_tokens=30, on_overflow="truncate_context")) == (whole, 30)
    assert warnings == []


def test_an_instruction_that_is_too_long_alone_is_an_error_that_says_so(generator):
    prompt = Prompt("What is dew? " * 40, CONTEXTS["words"])
    bare = len(generator.tokenizer.encode(prompt.instruction))
    with pytest.raises(PromptError) as caught:
        narrow(generator, bare).fit(prompt, chosen(on_overflow="truncate_context"))
    assert f"the prompt has {bare} tokens and the window {bare}" in str(caught.value)
    assert "shorten the instruction" in str(caught.value) and "truncate_context" not in str(caught.value)


def texts(generator: TextGenerator, prompts: list[Prompt], slots: int = 4, **keywords) -> list[list[str]]:
    return [[one.text for one in group] for group in generator.generate(prompts, chosen(**keywords), slots)]


def test_greedy_answers_are_the_text_that_transformers_makes(oracle, generator, prompts):
    tokenizer, expected = generator.tokenizer, []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt.instruction, prompt.context)])
        options = {"eos_token_id": sorted(tokenizer.control.stop), "pad_token_id": 0, "do_sample": False}
        made = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **options)
        expected.append([tokenizer.decode(made[0, ids.shape[1] :].tolist()).strip()])
    assert len(expected) == 10
    assert texts(generator, prompts, **GREEDY) == expected


def test_a_list_has_the_answers_of_its_inputs_asked_alone(generator, prompts):
    options = {"max_new_tokens": 20, "seed": 11, "num_return_sequences": 2}
    together = texts(generator, prompts, slots=7, **options)
    assert together == [texts(generator, [prompt], slots=1, **options)[0] for prompt in prompts]


def test_several_sequences_take_the_seeds_that_follow(generator, prompts):
    options = {"max_new_tokens": 12}
    several = texts(generator, prompts[:2], seed=40, num_return_sequences=3, **options)
    assert len(several) == 2 and len(set(several[0])) == 3
    for place in range(3):
        one = texts(generator, prompts[:2], seed=40 + place, **options)
        assert [group[place : place + 1] for group in several] == one
    last = texts(generator, prompts[:1], seed=2**32 - 1, num_return_sequences=2, **options)
    assert last[0][1] == texts(generator, prompts[:1], seed=0, **options)[0][0]


def test_without_a_seed_torch_decides(generator, prompts):
    def ask(**keywords):
        return texts(generator, prompts[:3], max_new_tokens=12, **keywords)

    torch.manual_seed(5)
    first, second = ask(), ask()
    assert first != second
    torch.manual_seed(5)
    assert [ask(), ask()] == [first, second]
    state = torch.random.get_rng_state()
    ask(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_full_text_has_the_instruction_before_the_answer(generator, prompts):
    plain, full = (texts(generator, prompts, return_full_text=full, **GREEDY) for full in (False, True))
    assert full == [[f"{prompt.instruction}\n{group[0]}"] for prompt, group in zip(prompts, plain, strict=True)]


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(generator, prompts):
    whole = texts(generator, prompts[:1], **GREEDY)[0][0]
    stop = whole[len(whole) // 2 :][:3]
    [[update]] = generator.generate(prompts[:1], chosen(stop=stop, **GREEDY), 1)
    assert update.text == whole[: whole.index(stop)].strip()
    assert update.finish_reason == "stop" and update.new_tokens < 24
    never = whole[-2:] + "\x00"  # its beginning is held back, and shown after all when nothing more comes
    assert texts(generator, prompts[:1], stop=["\x01", never], **GREEDY) == [[whole]]


@pytest.mark.parametrize("full", [False, True])
def test_updates_of_an_answer_only_grow_and_end_once(generator, prompts, full):
    options = chosen(max_new_tokens=30, seed=3, num_return_sequences=2, return_full_text=full)
    seen: dict[int, list] = {index: [] for index in range(2 * len(prompts))}
    for update in generator.stream(prompts, options, slots=5):
        if before := seen[update.index]:
            assert before[-1].finish_reason is None
            assert update.text.startswith(before[-1].text)
            assert update.new_tokens >= before[-1].new_tokens
            assert update.finish_reason or len(update.text) > len(before[-1].text)
        before.append(update)
    for index, updates in seen.items():
        prompt = prompts[index // 2]
        assert updates[-1].finish_reason in ("stop", "length") and updates[-1].new_tokens <= 30
        assert updates[-1].prompt_tokens == len(generator.tokenizer.encode(prompt.instruction, prompt.context))
    assert sum(len(updates) for updates in seen.values()) > 10 * len(seen)
    assert generator.generate([], options, slots=5) == []


def test_prompt_lookup_is_taken_where_it_does_not_show_or_where_it_is_asked_for(checkpoint_dir, prompts, monkeypatch):
    proposers = []
    run = Engine.run
    monkeypatch.setattr(
        Engine,
        "run",
        lambda self, requests, slots: proposers.extend(one.proposer for one in requests) or run(self, requests, slots),
    )
    full, half = (load(checkpoint_dir, "cpu", dtype).text_generator for dtype in ("fp32", "bf16"))
    texts = []
    for generator, lookup in ((full, "auto"), (full, True), (full, False), (half, "auto"), (half, True)):
        [[update]] = generator.generate(prompts[:1], chosen(**GREEDY, prompt_lookup=lookup), slots=1)
        texts.append(update.text)
    assert proposers == [PromptLookup, PromptLookup, None, None, PromptLookup]
    assert texts[0] == texts[1] == texts[2]


def test_numbers_of_numpy_give_the_answers_of_pythons(generator, prompts):
    numpy = {"max_new_tokens": np.int32(6), "seed": np.int64(3), "top_k": np.uint8(50), "top_p": np.float64(0.5)}
    plain = {name: value.item() for name, value in numpy.items()}
    texts = [[u.text for [u] in generator.generate(prompts[:2], chosen(**each), 2)] for each in (numpy, plain)]
    assert texts[0] == texts[1]
    assert all(type(value) in (int, float) for name, value in vars(chosen(**numpy)).items() if name in numpy)


@pytest.mark.parametrize("penalty", [1e-6, 0.01, 100.0, 1e6])
def test_the_largest_penalties_keep_logits_finite_and_in_order(penalty):
    logits = torch.linspace(-3e30, 3e30, 1000)
    pushed = penalize(logits, set(range(0, 1000, 2)), penalty)
    assert pushed.isfinite().all() and bool((pushed[::2].diff() > 0).all()) and torch.equal(pushed[1::2], logits[1::2])


@pytest.mark.parametrize("name", [row[0] for row in BAD_VALUES])
def test_arrays_and_objects_that_raise_are_setting_errors(name):
    class Raising:
        def _fail(self, *_):
            raise RuntimeError

        __eq__ = __str__ = __repr__ = __len__ = __bool__ = _fail
        __hash__ = object.__hash__

    for value in (np.arange(3), torch.ones(2), Raising(), [Raising()], b"x", 10**5000):
        with pytest.raises(SettingError, match=f"^{name} is "):
            chosen(**{name: value})
