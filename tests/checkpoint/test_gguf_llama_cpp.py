"""llama.cpp itself, through llama-cpp-python, answers from our GGUF files as our pipeline does. See docs/serving.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from modelscope_dolly import dolly_pipeline
from modelscope_dolly.checkpoint.tokenizer import read_tokenizer
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.prompt import CONTROL_KEYS, END_KEY, RESPONSE_KEY, render
from tests.support.models import random_model
from tests.support.paths import SHARED_DATA, needs_shared_data
from tests.support.training_runs import material, memorised

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed; it is in the extra `gguf`")

from modelscope_dolly.checkpoint.gguf_export import export_gguf  # noqa: E402

PYTHON = os.environ.get("DOLLY_LLAMACPP_PYTHON")
WINDOW, NEW_TOKENS = 512, 96

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(not PYTHON, reason="DOLLY_LLAMACPP_PYTHON names no Python with llama-cpp-python"),
]

#: Reads a list of questions from standard input, prints the list of answers. Keys and values are float32, not float16.
PROGRAM = """
import json, sys
import llama_cpp, numpy
path, window, questions = json.load(sys.stdin)
llm = llama_cpp.Llama(path, n_ctx=window, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False)
vocab = llama_cpp.llama_model_get_vocab(llm.model)

def logits():
    return numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))

def greedy(ids, count):
    llm.reset()
    llm.eval(ids)
    made = []
    while len(made) < count:
        made.append(int(logits().argmax()))
        if llama_cpp.llama_vocab_is_eog(vocab, made[-1]):
            break
        llm.eval(made[-1:])
    return made

def last(ids):
    llm.reset()
    llm.eval(ids)
    return logits().tolist()

def chat(messages, count):
    answer = llm.create_chat_completion(messages, temperature=0, max_tokens=count)
    choice = answer["choices"][0]
    return [choice["message"]["content"], choice["finish_reason"], answer["usage"]["prompt_tokens"]]

def tokenize(text, special):
    return llm.tokenize(text.encode(), add_bos=False, special=special)

known = {"greedy": greedy, "last": last, "chat": chat, "tokenize": tokenize, "metadata": lambda: llm.metadata}
print(json.dumps([known[name](*arguments) for name, *arguments in questions]))
"""


def llama(path: Path, questions: list[tuple], window: int = WINDOW) -> list:
    """The answers of llama.cpp to (function of PROGRAM, its arguments), from one GGUF file."""
    asked = json.dumps([str(path), window, questions])
    done = subprocess.run([PYTHON, "-c", PROGRAM], input=asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small model that knows most of 40 records by heart."""
    return memorised(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def exact(source, tmp_path_factory) -> Path:
    return export_gguf(source, tmp_path_factory.mktemp("gguf") / "dolly.gguf", "f32")


@pytest.fixture(scope="module")
def pipe(source):
    return dolly_pipeline(str(source), device="cpu", dtype="float32")


def records() -> list[dict]:
    return [json.loads(line) for line in (material() / "records.jsonl").read_text().splitlines()]


def test_greedy_answers_are_ours_token_by_token_and_stop_where_ours_do(pipe, exact):
    tokenizer, engine = pipe.model.checkpoint.tokenizer, pipe.model.text_generator.engine
    prompts = [tokenizer.encode(record["instruction"], record["context"]) for record in records()]
    theirs = llama(exact, [("greedy", ids, NEW_TOKENS) for ids in prompts])
    greedy = Sampling(do_sample=False)
    ours = engine.generate([Request(ids, NEW_TOKENS, greedy, tokenizer.control.stop) for ids in prompts])
    assert theirs == ours
    ended = sum(ids[-1] == tokenizer.control.end for ids in ours)
    print(f"{len(ours)} answers identical, {ended} of them ended by {END_KEY!r}")
    assert len(ours) == 40 and ended >= 20


def test_chat_completions_render_our_prompt_and_give_our_text(pipe, exact):
    tokenizer = pipe.model.checkpoint.tokenizer
    asked = [record for record in records() if record["context"]][:3] + [r for r in records() if not r["context"]][:5]
    questions = []
    for record in asked:
        system = [{"role": "system", "content": record["context"]}] if record["context"] else []
        questions.append(("chat", [*system, {"role": "user", "content": record["instruction"]}], NEW_TOKENS))
    stopped = 0
    for record, (text, reason, prompt_tokens) in zip(asked, llama(exact, questions), strict=True):
        assert prompt_tokens == len(tokenizer.encode(record["instruction"], record["context"]))
        assert not any(key.strip() in text for key in CONTROL_KEYS)
        if reason == "stop":
            given = {"instruction": record["instruction"], "context": record["context"]}
            assert text.strip() == pipe(given, do_sample=False)["text"]
            stopped += 1
    assert stopped >= 3


def test_rendered_prompts_become_our_ids_and_typed_keys_control_tokens(pipe, exact):
    tokenizer = pipe.model.checkpoint.tokenizer
    texts = [render(record["instruction"], record["context"]) for record in records()]
    expected = [tokenizer.encode(record["instruction"], record["context"]) for record in records()]
    assert llama(exact, [("tokenize", text, True) for text in texts]) == expected
    typed = f"Name three colours.\n\n{RESPONSE_KEY}Red.\n\n{END_KEY}"
    [special, plain] = llama(exact, [("tokenize", typed, True), ("tokenize", typed, False)])
    assert (special.count(tokenizer.control.response), special.count(tokenizer.control.end)) == (1, 1)
    assert plain == tokenizer.encode_text(typed)


@pytest.mark.parametrize(("type_name", "near"), [("f32", 1e-3), ("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.3)])
def test_logits_of_every_type_are_near(pipe, source, tmp_path, type_name, near):
    tokenizer = pipe.model.checkpoint.tokenizer
    prompts = [tokenizer.encode(record["instruction"], record["context"]) for record in records()[:6]]
    path = export_gguf(source, tmp_path / "x.gguf", type_name)
    oracle = GPTNeoXForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        ours = torch.stack([oracle(torch.tensor([ids])).logits[0, -1] for ids in prompts])
    theirs = torch.tensor(llama(path, [("last", ids) for ids in prompts]))
    worst = float((theirs - ours).abs().max() / ours.std())
    print(f"{type_name}: largest difference {worst:.2g} standard deviations of the logits")
    assert worst < near and torch.equal(theirs.argmax(1), ours.argmax(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_parallel_residual": False},
        {"tie_word_embeddings": True},
        {"attention_bias": False},
        {"intermediate_size": 96},
    ],
    ids=str,
)
def test_other_networks(tokenizer, tmp_path, changes):
    """Also half-rotated heads of 80, rows without a token, and another layer norm epsilon."""
    settings = {
        "hidden_size": 160,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-3,
        "vocab_size": len(tokenizer.tokenizer) + 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000, "partial_rotary_factor": 0.5},
    }
    oracle = random_model(**settings, **changes)
    path = export_gguf(export_checkpoint(oracle, tokenizer, tmp_path / "source"), tmp_path / "x.gguf", "f32")
    ids = [token * 7 % 900 + 1 for token in range(40)]
    with torch.inference_mode():
        expected = oracle(torch.tensor([ids])).logits[0, -1]
    [found] = llama(path, [("last", ids)])
    assert float((torch.tensor(found) - expected).abs().max() / expected.std()) < 0.01


@needs_shared_data
def test_the_tokenizer_of_gpt_neox_on_databricks_dolly_15k(tmp_path):
    """Every text of the public records that is in NFC, which llama.cpp does not apply."""
    shutil.copyfile(SHARED_DATA / "gpt-neox-20b-tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = read_tokenizer(tmp_path, add_keys=True)
    network = random_model(vocab_size=50280, num_hidden_layers=1)
    path = export_gguf(export_checkpoint(network, tokenizer, tmp_path / "source"), tmp_path / "x.gguf", "q8_0")
    lines = (SHARED_DATA / "databricks-dolly-15k.jsonl").read_text("utf-8").split("\n")
    texts = [text for line in lines if line for text in json.loads(line).values() if text]
    theirs = llama(path, [("tokenize", text, False) for text in texts])
    differing = [text for text, ids in zip(texts, theirs, strict=True) if ids != tokenizer.encode_text(text)]
    normalize = tokenizer.tokenizer.backend_tokenizer.normalizer.normalize_str
    other = [text for text in differing if normalize(text) == text]
    print(f"{len(texts)} texts, {len(differing)} differ, {len(other)} of them in NFC")
    assert len(texts) > 40_000 and other == []
