"""llama.cpp's own server answers from our GGUF files as our pipeline does. See docs/serving.md."""

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
from tests.support.training_runs import free_port, material, memorised

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed; it is in the extra `gguf`")

from modelscope_dolly.checkpoint.gguf_export import export_gguf  # noqa: E402

PYTHON = os.environ.get("DOLLY_LLAMACPP_PYTHON")
WINDOW, NEW_TOKENS = 512, 96

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(not PYTHON, reason="DOLLY_LLAMACPP_PYTHON names no Python with xllamacpp"),
]

#: Reads a list of requests from standard input, sends them to llama.cpp's server, prints the list of its answers.
#: Keys and values are float32, not float16.
PROGRAM = """
import json, sys, urllib.request
import xllamacpp
path, window, port, requests = json.load(sys.stdin)
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.port, settings.n_parallel, settings.warmup = path, window, port, 1, False
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)

def answer(name, body):
    content = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/{name}", json.dumps(body).encode(), content)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)

print(json.dumps([answer(*request) for request in requests]))
"""


def llama_server(path: Path, requests: list[tuple[str, dict]], window: int = WINDOW) -> list[dict]:
    """What llama.cpp's server answers to (name of the endpoint, body of the request), from one GGUF file."""
    asked = json.dumps([str(path), window, free_port(), requests])
    done = subprocess.run([PYTHON, "-c", PROGRAM], input=asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def completion(ids: list[int], **settings) -> tuple[str, dict]:
    """The request for the greedy continuation of a prompt of token ids."""
    body = {"prompt": ids, "n_predict": NEW_TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    return "completion", body | settings


def tokenize(text: str, special: bool) -> tuple[str, dict]:
    return "tokenize", {"content": text, "parse_special": special, "add_special": True}


def log_probabilities(path: Path, prompts: list[list[int]], rows: int) -> torch.Tensor:
    """Of every token after each prompt, as llama.cpp computes them."""
    answers = llama_server(path, [completion(ids, n_predict=1, n_probs=rows) for ids in prompts])
    found = torch.full((len(prompts), rows), float("nan"))
    for row, answer in zip(found, answers, strict=True):
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return found


def worst_difference(found: torch.Tensor, logits: torch.Tensor) -> float:
    """The largest one between log probabilities, in standard deviations of the logits."""
    return float((found - logits.log_softmax(-1)).abs().max() / logits.std())


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
    theirs = llama_server(exact, [completion(ids) for ids in prompts])
    greedy = Sampling(do_sample=False)
    ours = engine.generate([Request(ids, NEW_TOKENS, greedy, tokenizer.control.stop) for ids in prompts])
    assert [answer["tokens"] for answer in theirs] == ours
    stops = {True: "eos", False: "limit"}
    assert [answer["stop_type"] for answer in theirs] == [stops[ids[-1] in tokenizer.control.stop] for ids in ours]
    ended = sum(ids[-1] == tokenizer.control.end for ids in ours)
    print(f"{len(ours)} answers identical, {ended} of them ended by {END_KEY!r}")
    assert len(ours) == 40 and ended >= 20


def test_chat_completions_render_our_prompt_and_give_our_text(pipe, exact):
    chats = []
    for record in records():
        system = [{"role": "system", "content": record["context"]}] if record["context"] else []
        chats.append({"messages": [*system, {"role": "user", "content": record["instruction"]}]})
    rendered = llama_server(exact, [("apply-template", chat) for chat in chats])
    assert [answer["prompt"] for answer in rendered] == [render(r["instruction"], r["context"]) for r in records()]
    asked = [chat | {"temperature": 0, "max_tokens": NEW_TOKENS} for chat in chats]
    stopped = 0
    for record, answer in zip(records(), llama_server(exact, [("v1/chat/completions", a) for a in asked]), strict=True):
        choice = answer["choices"][0]
        assert not any(key.strip() in choice["message"]["content"] for key in CONTROL_KEYS)
        if choice["finish_reason"] == "stop":
            given = {"instruction": record["instruction"], "context": record["context"]}
            assert choice["message"]["content"].strip() == pipe(given, do_sample=False)["text"]
            stopped += 1
    assert stopped >= 20


def test_sampling_settings_of_the_file_are_the_defaults_of_the_server(exact):
    [answer] = llama_server(exact, [("completion", {"prompt": "Name three colours.", "n_predict": 1})])
    found = answer["generation_settings"]
    assert (found["temperature"], found["top_k"], found["min_p"]) == (1.0, 0, 0.0)
    assert found["top_p"] == pytest.approx(0.92) and found["repeat_penalty"] == 1.0


def test_rendered_prompts_become_our_ids_and_typed_keys_control_tokens(pipe, exact):
    tokenizer = pipe.model.checkpoint.tokenizer
    texts = [render(record["instruction"], record["context"]) for record in records()]
    expected = [tokenizer.encode(record["instruction"], record["context"]) for record in records()]
    assert [answer["tokens"] for answer in llama_server(exact, [tokenize(text, True) for text in texts])] == expected
    typed = f"Name three colours.\n\n{RESPONSE_KEY}Red.\n\n{END_KEY}"
    answers = llama_server(exact, [tokenize(typed, True), tokenize(typed, False)])
    special, plain = (answer["tokens"] for answer in answers)
    assert (special.count(tokenizer.control.response), special.count(tokenizer.control.end)) == (1, 1)
    assert plain == tokenizer.encode_text(typed)


@pytest.mark.parametrize(("type_name", "near"), [("f32", 0.005), ("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.3)])
def test_logits_of_every_type_are_near(pipe, source, tmp_path, type_name, near):
    tokenizer = pipe.model.checkpoint.tokenizer
    prompts = [tokenizer.encode(record["instruction"], record["context"]) for record in records()[:6]]
    path = export_gguf(source, tmp_path / "x.gguf", type_name)
    oracle = GPTNeoXForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        ours = torch.stack([oracle(torch.tensor([ids])).logits[0, -1] for ids in prompts])
    theirs = log_probabilities(path, prompts, ours.shape[1])
    worst = worst_difference(theirs, ours)
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
        expected = oracle(torch.tensor([ids])).logits[:, -1]
    assert worst_difference(log_probabilities(path, [ids], expected.shape[1]), expected) < 0.01


@needs_shared_data
def test_the_tokenizer_of_gpt_neox_on_databricks_dolly_15k(tmp_path):
    """Every text of the public records that is in NFC, which llama.cpp does not apply."""
    shutil.copyfile(SHARED_DATA / "gpt-neox-20b-tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = read_tokenizer(tmp_path, add_keys=True)
    network = random_model(vocab_size=50280, num_hidden_layers=1)
    path = export_gguf(export_checkpoint(network, tokenizer, tmp_path / "source"), tmp_path / "x.gguf", "q8_0")
    lines = (SHARED_DATA / "databricks-dolly-15k.jsonl").read_text("utf-8").split("\n")
    texts = [text for line in lines if line for text in json.loads(line).values() if text]
    theirs = [answer["tokens"] for answer in llama_server(path, [tokenize(text, False) for text in texts])]
    differing = [text for text, ids in zip(texts, theirs, strict=True) if ids != tokenizer.encode_text(text)]
    normalize = tokenizer.tokenizer.backend_tokenizer.normalizer.normalize_str
    other = [text for text in differing if normalize(text) == text]
    print(f"{len(texts)} texts, {len(differing)} differ, {len(other)} of them in NFC")
    assert len(texts) > 30_000 and other == []
