"""The prompt contract: bytes, token ids, and that no user can type a control token."""

from __future__ import annotations

import json
import re
import sys
import threading
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from modelscope_dolly.errors import CheckpointError, PromptError
from modelscope_dolly.prompt import (
    CONTROL_KEYS,
    END_KEY,
    INTRO,
    RESPONSE_KEY,
    ROLES,
    DollyTokenizer,
    chat_template,
    check_instruction,
    check_text,
    reduce_conversation,
    render,
    render_example,
)
from tests.support.paths import SHARED_DATA, needs_shared_data
from tests.support.texts import KEYS, TEXT, TYPED_KEYS, examples


def has_key(*texts: str | None) -> bool:
    """Also a key that only arises where the template's own line breaks follow the text."""
    return any(key in f"{text}\n\n" for key in KEYS for text in texts if text)


def reference(tokenizer: DollyTokenizer, text: str) -> list[int]:
    """Plain Hugging Face tokenization of a whole string, keys in it recognised."""
    return tokenizer.tokenizer(text, add_special_tokens=False).input_ids


def gpt_neox_backend() -> Tokenizer:
    return Tokenizer.from_file(str(SHARED_DATA / "gpt-neox-20b-tokenizer.json"))


def with_keys(backend: Tokenizer, **options) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(key, special=True, normalized=False) for key in CONTROL_KEYS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def test_prompt_has_the_bytes_of_the_reference():
    assert render("What is dew?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nWhat is dew?\n\n### Response:\n"
    )
    assert render("What is dew?", "") == render("What is dew?", None) == render("What is dew?")


def test_prompt_with_context_has_an_input_section():
    assert render("What is dew?", "Dew is water.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nWhat is dew?\n\nInput:\nDew is water.\n\n### Response:\n"
    )


def test_training_text_ends_with_the_end_key():
    for context in (None, "Dew is water."):
        assert render_example("What is dew?", context, "Water.") == (
            render("What is dew?", context) + "Water.\n\n### End"
        )


def assert_equal_to_reference(tokenizer: DollyTokenizer, records: list[dict], backend: Tokenizer) -> int:
    fields = [(record["instruction"], record["context"], record["response"]) for record in records]
    wholes = backend.encode_batch_fast([render_example(*texts) for texts in fields], add_special_tokens=False)
    visited = 0
    for (instruction, context, response), whole in zip(fields, wholes, strict=True):
        ids, prompt = tokenizer.encode_example(instruction, context, response)
        assert ids == whole.ids, instruction
        assert ids.index(tokenizer.control.response) == prompt - 1, instruction  # the prompt ends with this key
        assert not {*ids[prompt:-1]} & tokenizer.special_ids and ids[-1] == tokenizer.control.end, instruction
        visited += 1
    return visited


@needs_shared_data
def test_every_record_of_dolly_15k_has_the_ids_of_the_reference():
    hf = with_keys(gpt_neox_backend())
    tokenizer = DollyTokenizer(hf)
    control = tokenizer.control
    assert (control.end, control.instruction, control.response, control.eos) == (50277, 50278, 50279, 0)
    assert len(hf) == 50280
    lines = (SHARED_DATA / "databricks-dolly-15k.jsonl").read_text(encoding="utf-8").splitlines()
    assert assert_equal_to_reference(tokenizer, [json.loads(line) for line in lines], hf.backend_tokenizer) == 15015


@needs_shared_data
def test_tokenizer_of_the_base_model_is_refused():
    with pytest.raises(CheckpointError, match="'### End' must be a single token, found 2 tokens"):
        DollyTokenizer(PreTrainedTokenizerFast(tokenizer_object=gpt_neox_backend()))


def test_every_nano_record_has_the_ids_of_the_reference(tokenizer, records):
    assert assert_equal_to_reference(tokenizer, records, tokenizer.tokenizer.backend_tokenizer) == len(records) == 128


@examples
@given(TEXT, st.none() | TEXT, TEXT)
def test_text_without_keys_has_the_ids_of_the_reference(tokenizer, instruction, context, response):
    if has_key(instruction, context, response):
        return
    assert tokenizer.encode(instruction, context) == reference(tokenizer, render(instruction, context))
    ids, prompt = tokenizer.encode_example(instruction, context, response)
    assert ids == reference(tokenizer, render_example(instruction, context, response))
    assert ids[:prompt] == tokenizer.encode(instruction, context)


@examples
@given(TYPED_KEYS, st.none() | TYPED_KEYS, TYPED_KEYS)
def test_a_typed_key_is_never_a_control_token(tokenizer, instruction, context, response):
    control = tokenizer.control
    ids, prompt = tokenizer.encode_example(instruction, context, response)
    found = [token_id for token_id in ids if token_id in tokenizer.special_ids]
    assert found == [control.instruction, control.response, control.end]
    # Between the keys stands what was typed, in the normal form in which the tokenizer reads all text.
    body = ids[ids.index(control.instruction) + 1 : prompt - 1]
    section = f"Input:\n{context}\n\n" if context else ""
    assert tokenizer.decode(body) == unicodedata.normalize("NFC", f"\n{instruction}\n\n{section}")
    assert tokenizer.decode(ids[prompt:-1]) == unicodedata.normalize("NFC", f"{response}\n\n")


@pytest.fixture
def impatient_threads():
    """Threads take turns after every few instructions, which finds a race in milliseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("key", KEYS)
def test_a_typed_key_is_text_whatever_other_threads_do_with_the_public_tokenizer(tokenizer, key, impatient_threads):
    assert len(reference(tokenizer, key)) == 1  # this call sets the flag of its backend to recognise keys
    assert tokenizer.decode(tokenizer.encode_text(key)) == key
    stop, calls = threading.Event(), [0, 0]

    def use_public_tokenizer(worker: int) -> None:
        while not stop.is_set():
            tokenizer.tokenizer(key, split_special_tokens=bool(calls[worker] % 2), add_special_tokens=False)
            calls[worker] += 1

    threads = [threading.Thread(target=use_public_tokenizer, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    seen: list[int] = []
    try:
        while min(*calls, len(seen)) < 500 and all(thread.is_alive() for thread in threads):
            seen.extend(tokenizer.encode_text(key))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert min(*calls, len(seen)) >= 500
    assert not set(seen) & tokenizer.special_ids


@pytest.mark.parametrize("key", KEYS)
def test_tokenizer_with_a_key_that_is_not_special_is_refused(tokenizer, key):
    saved = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    changed = [token for token in saved["added_tokens"] if token["content"] == key]
    assert len(changed) == 1
    changed[0]["special"] = False
    with pytest.raises(CheckpointError, match="is not marked as special"):
        DollyTokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(saved))))


def test_truncation_and_padding_of_the_public_tokenizer_do_not_reach_prompts(tokenizer):
    backend = Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=40)
    cut = DollyTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert cut.encode("What is dew?") == tokenizer.encode("What is dew?")


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["a"], "a lone \ud83d surrogate"])
def test_what_is_no_text_is_a_prompt_error_that_names_the_field(value):
    for call in (lambda: check_instruction(value), lambda: check_text("instruction", value)):
        with pytest.raises(PromptError, match=r"^instruction (must be a string|is not valid Unicode)"):
            call()


@pytest.mark.parametrize("value", ["", "  ", "\n\t\u3000"])
def test_blank_instruction_is_a_prompt_error(value):
    with pytest.raises(PromptError, match="instruction is empty"):
        check_instruction(value)


@pytest.mark.parametrize("system", [None, "Dew is water."])
def test_chat_template_renders_the_last_question_as_the_prompt(tokenizer, system):
    turns = [("user", "What is rain?"), ("assistant", "Water."), ("user", "What is dew?\n'quoted' {{ x }}")]
    if system:
        turns.insert(0, ("system", system))
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.tokenizer.apply_chat_template(messages, chat_template=chat_template(), tokenize=False)
    assert rendered == render(turns[-1][1], system)


MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXT | TYPED_KEYS}), min_size=1, max_size=6
)


@examples
@given(MESSAGES)
def test_a_conversation_is_reduced_to_what_the_chat_template_renders(tokenizer, messages):
    try:
        instruction, context = reduce_conversation(messages)
    except PromptError:
        users = [message["content"] for message in messages if message["role"] == "user"]
        assert not users or not users[-1].strip()
        return
    rendered = tokenizer.tokenizer.apply_chat_template(messages, chat_template=chat_template(), tokenize=False)
    assert rendered == render(instruction, context)
    found = [token_id for token_id in tokenizer.encode(instruction, context) if token_id in tokenizer.special_ids]
    assert found == [tokenizer.control.instruction, tokenizer.control.response]  # whatever was typed


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "messages must be a list of messages, found str"),
        ([], "none of the 0 messages has the role 'user'"),
        ([{"role": "system", "content": "Dew is water."}], "none of the 1 messages has the role 'user'"),
        (["hello"], "message 1 must be {'role': ..., 'content': ...}, found str: 'hello'"),
        ([{"role": "user"}], "message 1 must be"),
        ([{"role": "user", "content": "a"}, {"role": "usr", "content": "b"}], "Did you mean 'user'"),
        ([{"role": "user", "content": "a"}, {"role": ["user"], "content": "b"}], "unknown role of message 2"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of message 1 must be a string, found list"),
        ([{"role": "user", "content": "a \ud83d"}], "content of message 1 is not valid Unicode"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": " "}], "instruction is empty"),
    ],
)
def test_what_is_no_conversation_is_a_prompt_error(messages, says):
    with pytest.raises(PromptError, match=re.escape(says)):
        reduce_conversation(messages)


def test_constants_are_parts_of_the_prompt():
    assert render("x").startswith(INTRO) and render("x").endswith(RESPONSE_KEY)
    assert render_example("x", None, "y").endswith(END_KEY)
