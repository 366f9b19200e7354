"""What goes wrong ends what it concerns and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.serving import post, running

#: One token is far likelier than those that end an answer.
ENDLESS = {"max_tokens": 1900, "temperature": 0, "logit_bias": {"65": 100}}
LONG = {"messages": [{"role": "user", "content": "Count."}], "stream": True, **ENDLESS}


@pytest.fixture
def steps(server):
    """Tokens of each step that the engine has taken."""
    taken: list[int] = []
    hook = server.engine.net.register_forward_pre_hook(lambda net, inputs: taken.append(len(inputs[0])))
    yield taken
    hook.remove()


@pytest.fixture
def begun(server):
    """Set when the engine takes a step."""
    event = threading.Event()
    hook = server.engine.net.register_forward_pre_hook(lambda *_: event.set())
    yield event
    hook.remove()


@pytest.mark.parametrize("way", ["closed", "killed"])
def test_a_client_that_goes_away_frees_its_slot(server, steps, way):
    body = json.dumps({**LONG, "n": 1})
    if way == "closed":
        with server.connect(post("/v1/chat/completions", body.encode())) as connection:
            connection.recv(10)
    else:
        command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-d", body]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            client.stdout.readline()
            client.send_signal(signal.SIGKILL)
    line = server.line("outcome=disconnected")
    server.lines.clear()
    seen = len(steps)
    assert server.chat(max_tokens=3)[0] == 200
    assert all(tokens == 1 or number == 0 for number, tokens in enumerate(steps[seen + 1 :]))  # nobody else runs
    assert int(line.split("new=")[1].split()[0]) < 1900 and server.engine.occupancy == (0, 0)


def test_a_client_that_does_not_wait_for_a_whole_answer_frees_its_slot_too(server, steps, begun):
    body = {**LONG, "stream": False}
    with server.connect(post("/v1/chat/completions", json.dumps(body).encode())):
        assert begun.wait(60)
    server.line("outcome=disconnected")
    server.lines.clear()
    assert len(steps) < 1900 and server.service.admission.open == 0


def test_a_device_error_ends_what_runs_with_one_clear_error_and_the_next_request_works(server):
    failed: list[int] = []

    def fail(net, inputs):
        if server.engine.occupancy[0] == 3 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("out of memory")

    expected = server.chat(max_tokens=5, seed=1)[1]["choices"]
    hook = server.engine.net.register_forward_pre_hook(fail)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)

    def stream() -> str:
        try:  # with a status of its own if it has not begun, else as an event
            with client.chat.completions.create(model="dolly", **LONG) as chunks:
                for _ in chunks:
                    pass
        except openai.APIError as error:
            return error.message.removeprefix("Error code: 500 - ")
        return "no error"

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream) for _ in range(2)]
        whole = pool.submit(server.chat, **ENDLESS)
        messages = [future.result() for future in streams]
        status, body, _ = whole.result()
    hook.remove()
    client.close()
    assert status == 500 and body["error"]["code"] == "device_error" and "out of memory" in body["error"]["message"]
    assert set(messages) == {body["error"]["message"]}
    assert server.chat(max_tokens=5, seed=1)[1]["choices"] == expected
    text = server.ask("/metrics")[1]
    assert 'outcome="error"} 3.0' in text and "dolly_slots_in_use 0.0" in text


def test_an_error_that_is_not_ours_is_told_as_well(server):
    def fail(net, inputs):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    hook = server.engine.net.register_forward_pre_hook(fail)
    status, body, _ = server.chat(max_tokens=5)
    hook.remove()
    assert status == 500 and "an illegal memory access was encountered" in body["error"]["message"]
    assert server.chat(max_tokens=2)[0] == 200


# Whole numbers are small, or too large: one between would be a valid, long answer.
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([10**12, -(10**30), 10**400])
    | st.floats() | st.text(max_size=20) | st.sampled_from(["dolly", "user", "system", "\ud800", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
NAMES = (
    "messages", "prompt", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop",
    "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "presence_penalty", "frequency_penalty",
    "tools", "response_format", "context", "top_k", "min_p", "repetition_penalty", "on_overflow", "bad_words", "echo",
    "best_of", "suffix", "user", "min_new_tokens", "input", "parameters", "tokens", "choices", "regex",
)  # fmt: skip
PATHS = ("/v1/chat/completions", "/v1/completions", "/call", "/tokenize", "/detokenize")
VALID = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/call": {"input": "Hi", "parameters": {"max_new_tokens": 1}},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
}


@st.composite
def bodies(draw) -> tuple[str, bytes]:
    path = draw(st.sampled_from(PATHS))
    if draw(st.integers(0, 5)) == 0:
        return path, draw(st.binary(max_size=60))
    body = {**VALID[path], **draw(st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=3))}
    if draw(st.booleans()):
        body = {name: value for name, value in body.items() if name not in VALID[path]}
    text = json.dumps(body).encode()
    return path, text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 5)) == 0 else text


def test_malformed_requests_are_refused_with_the_body_of_an_error(server, record_property):
    """Some of them turn out to be valid; none is a mistake of the server."""
    count = int(os.environ.get("DOLLY_MALFORMED_REQUESTS", "150"))
    seen: list[int] = []

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(bodies())
    def check(pair):
        path, body = pair
        status, answer, _ = server.ask(path, body)
        seen.append(status)
        assert status == 200 or 400 <= status < 500, (body, answer)
        if status != 200:
            assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
            assert answer["error"]["message"] and "\n" not in answer["error"]["message"]

    check()
    record_property("cases", ("malformed requests", sum(status != 200 for status in seen)))
    assert sum(status != 200 for status in seen) > count // 3
    assert not any("Traceback" in line or "mistake" in line for line in server.lines)
    assert server.service.admission.open == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /call HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /call HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["TLS", "no path", "version", "no host", "header", "long header", "negative length", "chunk"],
)
def test_what_is_not_http_is_refused_with_the_same_body(server, raw):
    status, body = server.send(raw)
    assert 400 <= status < 500 and set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_unknown_paths_and_methods_and_a_device_that_cannot_hold_the_request(dolly, monkeypatch):
    with running(dolly) as server:
        assert server.ask("/v2/chat")[1]["error"]["code"] == "unknown_path"
        assert server.ask("/v1/chat/completions")[0] == 405
        assert server.ask("/%00%0d%0aX")[0] == 404
        small = 100 * server.engine.net.cache_bytes
        monkeypatch.setattr("modelscope_dolly.engine.runner.free_memory", lambda device: small)
        status, body, _ = server.chat(max_tokens=1000)
        assert status == 400 and "no memory for the keys and values of" in body["error"]["message"]
