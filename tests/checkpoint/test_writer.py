"""An exported directory is what every reader expects."""

import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.writer import both_spellings, export_checkpoint
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT
from tests.support import layouts
from tests.support.models import random_model


def _json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# What is in it


def test_it_holds_exactly_the_files_that_readers_expect_and_no_code(checkpoint_dir):
    assert {path.name for path in checkpoint_dir.rglob("*")} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "configuration.json",
        "manifest.json",
    }


def test_the_manifest_covers_every_other_file(checkpoint_dir):
    names = {path.name for path in checkpoint_dir.iterdir()}
    assert set(manifest.read(checkpoint_dir)) == names - {manifest.NAME}
    assert manifest.differences(checkpoint_dir) == []


def test_every_file_may_be_read_by_whoever_may_read_the_configuration(tokenizer, tmp_path):
    before = os.umask(0o022)
    try:
        directory = export_checkpoint(random_model(), tokenizer, tmp_path / "exported")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory, *directory.iterdir())}
    assert len(modes) == 10
    assert modes.pop(directory.name) == 0o755
    assert set(modes.values()) == {0o644}, modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_configuration_has_both_spellings_and_the_cache_on(tokenizer, tmp_path, dtype):
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    model = random_model(rope_parameters=rope, use_cache=False).to(dtype)
    config = _json(export_checkpoint(model, tokenizer, tmp_path / "exported") / "config.json")
    assert config["rope_parameters"] == rope
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.5, 5000.0)
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert config["use_cache"] is True
    assert config["architectures"] == ["GPTNeoXForCausalLM"]


def test_a_configuration_of_2023_gets_both_spellings_and_loses_its_pointers_to_code():
    old = {"rotary_pct": 0.5, "rotary_emb_base": 5000, "torch_dtype": "bfloat16", "use_cache": False}
    new = both_spellings({**old, "custom_pipelines": {"a": 1}, "auto_map": {"b": 2}, "vocab_size": 50280})
    assert new["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000, "partial_rotary_factor": 0.5}
    assert {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 50280,
    }.items() <= new.items()
    assert not {"custom_pipelines", "auto_map"} & set(new)


def test_generation_stops_at_both_ids_and_samples_as_the_public_pipeline_does(checkpoint_dir, tokenizer):
    generation = _json(checkpoint_dir / "generation_config.json")
    assert sorted(generation["eos_token_id"]) == sorted(tokenizer.control.stop)
    assert generation["pad_token_id"] == generation["bos_token_id"] == tokenizer.control.eos
    wanted = {"do_sample": True, "top_p": 0.92, "top_k": 0, "max_new_tokens": 256}
    assert wanted.items() <= generation.items()


def test_the_file_of_modelscope_names_our_pipeline_and_asks_for_no_code(checkpoint_dir):
    assert _json(checkpoint_dir / "configuration.json") == {
        "framework": "pytorch",
        "task": "text-generation",
        "model": {"type": "dolly-v2"},
        "pipeline": {"type": "modelscope-dolly"},
    }


def test_large_weights_are_split_into_shards_that_the_index_lists(tokenizer, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr("modelscope_dolly.checkpoint.writer.SHARD_SIZE", "400KB")
    directory = export_checkpoint(random_model(), tokenizer, tmp_path / "exported")
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(shards) > 2
    assert set(_json(directory / "model.safetensors.index.json")["weight_map"].values()) == set(shards)
    assert len({stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}) == 1
    layouts.assert_same_network(layouts.load(directory), oracle, tokenizer.encode("Split?"))


# How others read it


def test_transformers_loads_the_same_network(checkpoint_dir, tokenizer):
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint_dir).eval()
    assert theirs.generation_config.eos_token_id == [tokenizer.control.end, tokenizer.control.eos]
    layouts.assert_same_network(layouts.load(checkpoint_dir), theirs, tokenizer.encode("What is a lake?"))


def test_an_export_of_what_was_loaded_is_the_same_again(checkpoint_dir, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint_dir)
    again = export_checkpoint(theirs, open_checkpoint(checkpoint_dir).tokenizer, tmp_path / "again")
    names = sorted(path.name for path in checkpoint_dir.iterdir())
    assert [name for name in names if (again / name).read_bytes() != (checkpoint_dir / name).read_bytes()] == []


@pytest.fixture(scope="module")
def their_tokenizer(checkpoint_dir):
    return AutoTokenizer.from_pretrained(checkpoint_dir)


def _chat_ids(tokenizer, instruction, context):
    messages = [{"role": "system", "content": context}] if context is not None else []
    messages.append({"role": "user", "content": instruction})
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)


AWKWARD = [
    "What is a lake?",
    "'single' and \"double\" and '''three'''",
    "{{ instruction }} {% raw %} {# no comment #} {braces} %}",
    "one\ntwo\n\nfour\n",
    "\n leading and trailing \n",
    "back\\slash \\n and \t tab",
    "naïve 日本語 🙂",
]


@pytest.mark.parametrize("context", [None, "", *AWKWARD])
@pytest.mark.parametrize("instruction", AWKWARD)
def test_the_chat_template_gives_the_token_ids_of_the_prompt(their_tokenizer, tokenizer, instruction, context):
    assert _chat_ids(their_tokenizer, instruction, context) == tokenizer.encode(instruction, context)


# A server tokenizes one string, in which a key typed by a user is a key: prompt.chat_template says so.
ORDINARY = st.text().filter(lambda text: not any(key.strip() in text for key in (*CONTROL_KEYS, END_OF_TEXT)))


@settings(max_examples=100, deadline=None)
@given(ORDINARY.filter(str.strip), st.none() | ORDINARY)
def test_the_chat_template_gives_the_token_ids_of_the_prompt_for_any_text(
    their_tokenizer, tokenizer, instruction, context
):
    assert _chat_ids(their_tokenizer, instruction, context) == tokenizer.encode(instruction, context)


def test_the_chat_template_takes_the_last_question_and_the_response_key_keeps_its_newline(their_tokenizer, tokenizer):
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "second"},
    ]
    encoded = their_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert list(encoded["input_ids"]) == tokenizer.encode("second")
    assert encoded["input_ids"][-1] == tokenizer.control.response
