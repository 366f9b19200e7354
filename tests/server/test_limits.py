"""Whoever sends too much, too often, too slowly, or without a key is refused; the others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import pytest

from modelscope_dolly.server import startup
from modelscope_dolly.server.api_errors import ApiError
from modelscope_dolly.server.connection import ABORT
from modelscope_dolly.server.limits import Admission, Keys, RateLimit
from modelscope_dolly.server.streaming import EventStream
from tests.support.serving import post, read_all, running

#: One token is far likelier than those that end an answer.
ENDLESS = {"max_tokens": 1900, "logit_bias": {"65": 100}}
STREAM = {"messages": [{"role": "user", "content": "Count."}], "stream": True, "n": 4, **ENDLESS}


def refusal(function, *arguments) -> ApiError:
    with pytest.raises(ApiError) as caught:
        function(*arguments)
    return caught.value


def test_a_key_is_compared_with_all_keys_and_never_kept():
    keys = Keys(["first", "second"])
    assert keys.check("Bearer first") == "key 1" and keys.check("bearer  second") == "key 2"
    for wrong in (None, "", "Bearer", "Bearer ", "Bearer firs", "Bearer first second", "Basic first", "first"):
        error = refusal(keys.check, wrong)
        assert error.status == 401 and error.headers()["www-authenticate"] == "Bearer"
    assert "first" not in repr(vars(keys)) and Keys([]).check(None) is None


def test_a_caller_has_so_many_requests_a_minute():
    now = [0.0]
    rate = RateLimit(6, lambda: now[0])
    for _ in range(6):
        rate.check("a")
    assert refusal(rate.check, "a").retry_after == 10
    rate.check("b")
    now[0] = 10.01
    rate.check("a")
    assert refusal(rate.check, "a").status == 429
    RateLimit(0).check("a")


def test_the_queue_is_bounded_and_says_when_to_come_back():
    admission = Admission(slots=2, queue=3)
    admission.enter(4)
    assert (admission.running, admission.waiting) == (2, 2)
    assert refusal(admission.enter, 2).status == 429 and refusal(admission.enter, 6).status == 400
    admission.enter(1)
    admission.leave(1, seconds=20.0)
    assert refusal(admission.enter, 2).retry_after >= 3
    admission.leave(4)
    assert admission.open == 0


@pytest.fixture(scope="module")
def strict(dolly):
    with running(
        dolly, slots=4, body_bytes=2000, arrival_seconds=1.5, idle_seconds=0.3, stall_seconds=0.3, queue=4
    ) as server:
        yield server


def test_a_body_that_is_too_long_is_refused_before_it_is_parsed(strict):
    for body in (b"x" * 2001, b"[" * 100_000):
        status, answer, _ = strict.ask("/v1/completions", body)
        assert status == 413 and answer["error"]["message"] == "the body has more than 2000 bytes"
    endless = b"POST /call HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024
    with strict.connect(endless) as connection:
        try:
            for _ in range(64):
                connection.sendall(b"\r\n400\r\n" + b"x" * 1024)
        except OSError:  # it has been refused
            pass
        assert read_all(connection).startswith((b"HTTP/1.1 413", b""))
    strict.line("request=POST /call", "outcome=too_large")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "no request arrived within 1.5 s"),
        (b"POST /v1/completions HT", "no request arrived within 1.5 s"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-", "no request arrived within 1.5 s"),
        (post("/v1/completions", b'{"prompt":', 100), "the body did not arrive within 1.5 s"),
    ],
    ids=["nothing", "half a line", "half a header", "half a body"],
)
def test_half_open_connections_are_closed(strict, sent, message):
    status, body = strict.send(sent)
    assert status == 408 and json.loads(body)["error"]["message"] == message
    assert strict.chat(max_tokens=2)[0] == 200


def test_an_idle_connection_is_closed_and_so_is_one_that_stops_in_its_second_request(strict):
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with strict.connect(ask) as connection:
        assert read_all(connection).count(b"HTTP/1.1 200") == 1
    with strict.connect(ask + b"GET /he") as connection:
        answer = read_all(connection)
        assert answer.count(b"HTTP/1.1 200") == 1


def test_a_reader_who_stands_still_is_dropped_and_holds_up_nobody(dolly, monkeypatch):
    monkeypatch.setattr(startup, "_UNREAD", 4096)
    many = {**STREAM, "max_tokens": 300, "logprobs": True, "top_logprobs": 20}  # megabytes, more than buffers hold
    with running(dolly, slots=5, stall_seconds=0.3) as server, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(server.address)
        slow.sendall(post("/v1/chat/completions", json.dumps(many).encode()))
        slow.recv(100)
        assert server.chat(max_tokens=5)[0] == 200
        server.line("outcome=stalled")
        assert server.service.admission.open == 0
        assert server.chat(max_tokens=5)[0] == 200


def test_a_stream_whose_piece_is_not_taken_is_dropped_and_its_answers_are_cancelled():
    """Without a network: the buffers of a system may be of any size."""
    ended: list[str] = []
    dropped, cancelled = asyncio.Event(), asyncio.Event()

    async def updates():
        try:
            while True:
                yield []
        finally:
            cancelled.set()

    async def send(message: dict) -> None:
        if message["type"] == "http.response.body":
            await dropped.wait()
            await asyncio.Event().wait()

    async def receive() -> dict:
        await dropped.wait()
        return {"type": "http.disconnect"}

    async def stream() -> None:
        news = updates()
        response = EventStream(await anext(news), news, lambda batch: iter([{}]), 0.05, ended.append)
        await response({"extensions": {ABORT: dropped.set}}, receive, send)

    asyncio.run(stream())
    assert ended == ["stalled", "disconnected"] and cancelled.is_set()


def test_a_request_that_waits_too_long_for_its_first_token_is_refused(dolly):
    with running(dolly, slots=1, first_seconds=0.2) as server:
        with server.connect(post("/v1/chat/completions", json.dumps({**STREAM, "n": 1}).encode())) as connection:
            connection.recv(10)
            status, body, headers = server.chat()
        assert (status, body["error"]["code"]) == (503, "timeout") and int(headers["retry-after"]) > 0
        assert server.line("outcome=timeout", "new=0")


def test_a_full_queue_refuses_and_those_who_wait_are_answered(dolly):
    with running(dolly, slots=1, queue=2) as server:
        found: list[int] = []
        with server.connect(post("/v1/chat/completions", json.dumps({**STREAM, "n": 1}).encode())) as connection:
            connection.recv(10)
            waiting = [threading.Thread(target=lambda: found.append(server.chat(max_tokens=2)[0])) for _ in range(2)]
            entered = threading.Semaphore(0)
            enter = server.service.admission.enter
            server.service.admission.enter = lambda count: (enter(count), entered.release())
            for thread in waiting:
                thread.start()
            entered.acquire()
            entered.acquire()
            status, body, headers = server.chat(max_tokens=2)
            assert (status, body["error"]["code"]) == (429, "queue_full") and headers["retry-after"]
            text = server.ask("/metrics")[1]
            assert "dolly_queue 2.0" in text and "dolly_slots_in_use 1.0" in text
            status, body, _ = server.chat(max_tokens=2, n=4)
            assert status == 400 and "this server takes 3 at a time" in body["error"]["message"]
        for thread in waiting:
            thread.join()
        assert found == [200, 200]
        assert "dolly_queue 0.0" in server.ask("/metrics")[1]


def test_keys_and_rates_hold_for_all_but_the_health_of_the_server(dolly):
    with running(dolly, keys=("k",), rate=3) as server:
        assert server.ask("/health")[0] == 200
        paths = ("/v1/models", "/metrics", "/describe", "/nothing")
        assert [server.ask(path)[0] for path in paths] == [401] * 4
        given = {"Authorization": "Bearer k"}
        assert [server.ask(path, headers=given)[0] for path in paths] == [200, 200, 200, 429]
