"""A published directory is read right by programs that know nothing of this package."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modelscope_dolly import dolly_pipeline
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.cli.main import main
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.prompt import CONTROL_KEYS
from tests.support.models import random_model
from train.publishing.publish_settings import PublishSettings
from train.publishing.staging import stage

NEW_TOKENS = 40
#: A Python that has ctranslate2 and transformers 4; see docs/serving.md.
CTRANSLATE2 = os.environ.get("DOLLY_CTRANSLATE2_PYTHON")


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory) -> Path:
    """A staged directory; half of each head is rotated, which is not what a reader would assume if it found nothing."""
    model = random_model(
        vocab_size=len(tokenizer.tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5},
    )
    source = export_checkpoint(model, tokenizer, tmp_path_factory.mktemp("published") / "model")
    return stage(source, PublishSettings("me/model", "v1.0.0")).directory


@pytest.fixture(scope="module")
def pipe(published):
    return dolly_pipeline(str(published), device="cpu", dtype="float32")


def questions(records) -> list[dict]:
    return [record for record in records if not any(key in str(record) for key in CONTROL_KEYS)][:12]


def chat(record: dict) -> list[dict]:
    """A record as messages: the context is a system message."""
    system = [{"role": "system", "content": record["context"]}] if record["context"] else []
    return [*system, {"role": "user", "content": record["instruction"]}]


def our_prompt(pipe, record: dict) -> list[int]:
    return pipe.model.checkpoint.tokenizer.encode(record["instruction"], record["context"])


def our_answers(pipe, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """The ids of our greedy answers, stop id included."""
    stop = pipe.model.checkpoint.tokenizer.control.stop
    requests = [Request(ids, new_tokens, Sampling(do_sample=False), stop) for ids in prompts]
    return pipe.model.text_generator.engine.generate(requests)


def test_chat_template_of_transformers_gives_our_prompt(published, pipe, records):
    tokenizer = AutoTokenizer.from_pretrained(published)
    asked = questions(records)
    assert any(record["context"] for record in asked) and not all(record["context"] for record in asked)
    for record in asked:
        theirs = tokenizer.apply_chat_template(chat(record), add_generation_prompt=True, return_dict=False)
        assert theirs == our_prompt(pipe, record)


def test_transformers_answers_as_we_do(published, pipe, records):
    model = AutoModelForCausalLM.from_pretrained(published)
    prompts = [our_prompt(pipe, record) for record in questions(records)[:4]]
    for ids, ours in zip(prompts, our_answers(pipe, prompts), strict=True):
        made = model.generate(torch.tensor([ids]), do_sample=False, top_p=None, max_new_tokens=NEW_TOKENS)
        assert made[0, len(ids) :].tolist() == ours


def test_transformers_finds_settings_and_both_stop_ids(published, pipe):
    model, control = AutoModelForCausalLM.from_pretrained(published), pipe.model.checkpoint.tokenizer.control
    found = model.generation_config
    assert set(found.eos_token_id) == control.stop and found.pad_token_id == control.eos
    assert (found.do_sample, found.top_p, found.top_k, found.max_new_tokens) == (True, 0.92, 0, 256)


def test_config_says_the_same_in_both_spellings_and_names_no_code(published):
    raw = json.loads((published / "config.json").read_text())
    assert raw["rotary_pct"] == raw["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert raw["rotary_emb_base"] == raw["rope_parameters"]["rope_theta"] == 10000
    assert raw["dtype"] == raw["torch_dtype"] == "float32" and raw["architectures"] == ["GPTNeoXForCausalLM"]
    assert raw["use_cache"] is True and not {"custom_pipelines", "auto_map"} & raw.keys()
    assert AutoConfig.from_pretrained(published).rope_parameters["partial_rotary_factor"] == 0.5
    assert not list(published.rglob("*.py"))


def test_dolly_check_finds_nothing_wrong(published, capsys):
    assert main(["check", str(published)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok ") for line in lines) >= 6
    assert not [line for line in lines if line.startswith(("note", "problem"))]


@pytest.mark.ctranslate2
@pytest.mark.skipif(not CTRANSLATE2, reason="DOLLY_CTRANSLATE2_PYTHON names no Python with ctranslate2, transformers 4")
def test_ctranslate2_converts_and_answers_as_we_do(published, pipe, records, tmp_path):
    program = """
import json, sys, ctranslate2, transformers
source, target, prompts, stop, count = json.load(sys.stdin)
ctranslate2.converters.TransformersConverter(source).convert(target)
words = transformers.AutoTokenizer.from_pretrained(source).convert_ids_to_tokens
answers = ctranslate2.Generator(target, compute_type="float32").generate_batch(
    [words(ids) for ids in prompts], sampling_topk=1, max_length=count, include_prompt_in_result=False, end_token=stop,
    return_end_token=True)
print(json.dumps([answer.sequences_ids[0] for answer in answers]))
"""
    prompts = [our_prompt(pipe, record) for record in questions(records)]
    stop = sorted(pipe.model.checkpoint.tokenizer.control.stop)
    asked = json.dumps([str(published), str(tmp_path / "converted"), prompts, stop, NEW_TOKENS])
    done = subprocess.run([CTRANSLATE2, "-c", program], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == our_answers(pipe, prompts)
