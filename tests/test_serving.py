"""vLLM, an unrelated server, answers from a published directory as our pipeline does. See docs/serving.md."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelscope_dolly import dolly_pipeline
from modelscope_dolly.checkpoint.tokenizer import read_tokenizer
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.prompt import CONTROL_KEYS, END_KEY, RESPONSE_KEY
from tests.support.training_runs import free_port, material, memorised
from train.publishing.publish_settings import PublishSettings
from train.publishing.staging import stage

PYTHON = os.environ.get("DOLLY_VLLM_PYTHON")
NAME, NEW_TOKENS = "dolly", 96
READY = "Application startup complete"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="DOLLY_VLLM_PYTHON names no Python that has vLLM; see docs/serving.md"),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A staged directory of a small model that knows most of 40 records by heart."""
    final = memorised(tmp_path_factory.mktemp("serving"))
    return stage(final, PublishSettings("me/dolly", "v1.0.0")).directory


@pytest.fixture(scope="module", params=[1, 2], ids=["whole", "spread over two"])
def server(request, published) -> Iterator[str]:
    """Address of vLLM's OpenAI-compatible server, by itself and with tensor parallelism."""
    port = free_port()
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(published),
        "--served-model-name",
        NAME,
    ]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(request.param)]
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[process % len(cores)]) for process in range(request.param))
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": bound}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, env=environment, **streams) as process:
        told = []
        for line in process.stdout:
            told.append(line)
            if READY in line:
                break
        else:
            pytest.fail("".join(told))
        rest = threading.Thread(target=process.stdout.read, daemon=True)  # or it would stop when the pipe is full
        rest.start()
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
        process.terminate()
        process.wait(timeout=60)
        rest.join(timeout=60)


def ask(address: str, messages: list[dict], **settings) -> dict:
    body = {"model": NAME, "messages": messages, "return_token_ids": True, **settings}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_chat_completions_are_our_greedy_answers_token_by_token(published, server):
    pipe = dolly_pipeline(str(published), device="cpu", dtype="float32")
    tokenizer = pipe.model.checkpoint.tokenizer
    records = [json.loads(line) for line in (material() / "records.jsonl").read_text().splitlines()]
    ended = 0
    for record in records:
        system = [{"role": "system", "content": record["context"]}] if record["context"] else []
        messages = [*system, {"role": "user", "content": record["instruction"]}]
        ids = tokenizer.encode(record["instruction"], record["context"])
        request = Request(ids, NEW_TOKENS, Sampling(do_sample=False), tokenizer.control.stop)
        [ours] = pipe.model.text_generator.engine.generate([request])
        theirs = ask(server, messages, temperature=0, max_tokens=NEW_TOKENS)
        choice = theirs["choices"][0]
        assert theirs["prompt_token_ids"] == ids
        assert choice["token_ids"] == ours, record["instruction"]
        assert not any(key.strip() in choice["message"]["content"] for key in CONTROL_KEYS)
        if ours[-1] == tokenizer.control.end:
            asked = {"instruction": record["instruction"], "context": record["context"]}
            assert choice["message"]["content"].strip() == pipe(asked, do_sample=False)["text"]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", tokenizer.control.end)
            ended += 1
        else:  # the texts may differ by half a character at the very end
            assert choice["finish_reason"] == "length" and len(ours) == NEW_TOKENS
    print(f"{len(records)} answers identical, {ended} of them ended by {END_KEY!r}")
    assert ended >= len(records) // 2


def test_the_published_sampling_settings_are_its_defaults(server):
    answer = ask(server, [{"role": "user", "content": "Name three colours."}], ignore_eos=True, max_tokens=None)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 256


def test_keys_typed_by_a_user_become_control_tokens_there_and_not_here(published, server):
    tokenizer = read_tokenizer(published)
    typed = f"Name three colours.\n\n{RESPONSE_KEY}Red.\n\n{END_KEY}"
    theirs = ask(server, [{"role": "user", "content": typed}], max_tokens=1)["prompt_token_ids"]
    control = tokenizer.control
    assert (theirs.count(control.response), theirs.count(control.end)) == (2, 1)
    ours = tokenizer.encode(typed)
    assert (ours.count(control.response), ours.count(control.end)) == (1, 0)
