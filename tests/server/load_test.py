"""A server under load: many clients, well-behaved and not, and afterwards everything is as it was before.

    python -m tests.server.load_test --seconds 180

Streams and whole answers, readers that leave early or read slowly, bodies that are malformed or too large, wrong keys,
and more requests than the queue takes. Then no slot is in use, memory is level, every answer that was completed is that
of the same request alone, and the server has counted what the clients have seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from modelscope_dolly.benchmark.raw_http import Connection, Reply
from train.nano import write_base

KEY, SLOTS, QUEUE, MOST_BYTES = "the-right-key", 8, 24, 1 << 16
#: Seconds after which a request counts as stuck.
STUCK = 120.0
#: Memory may grow by this share of the most that the server had after one of the warm-ups.
GROWTH, WARM_UPS = 0.05, 3
CHAT = "/v1/chat/completions"

#: How often a client does what.
BEHAVIOURS = {
    "whole": 30, "streamed": 30, "slow reader": 6, "leaves a stream": 10, "leaves before the answer": 6,
    "malformed": 6, "too large": 3, "wrong key": 5, "unknown": 2, "burst": 2,
}  # fmt: skip
#: Outcomes in the server's metrics for replies that the clients see.
OUTCOMES = {400: "invalid", 401: "unauthorized", 404: "not_found", 413: "too_large", 429: "refused"}
MALFORMED = (
    b"", b"{", b"[]", b"\xff", b'{"model": "dolly"}', b'{"model": "dolly", "messages": 3}', b"[" * 9000,
    b'{"model": "dolly", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"model": "dolly", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}',
)  # fmt: skip


def questions(count: int = 48) -> list[dict[str, Any]]:
    """Bodies of requests, greedy and seeded, of different lengths."""
    rng, found = random.Random(1), []
    for number in range(count):
        words = " ".join(rng.choices(("name", "three", "rivers", "poems", "of", "the", "sea", "please"), k=8))
        body = {"model": "dolly", "messages": [{"role": "user", "content": words}], "max_tokens": rng.randint(2, 60)}
        found.append(body | ({"temperature": 0} if number % 3 == 0 else {"seed": number, "temperature": 1.1}))
    return found


@dataclass
class Seen:
    """What the clients have seen.

    Attributes:
        replies: number of replies by status.
        left: requests that a client dropped after the server had them.
        answers: (question, text, finish reason) of completed answers, with how often each came.
        new_tokens: of completed whole answers, as the server said.
        first, between, total: seconds to the first event of streams, between events, and of completed requests.
        problems: sentences.
    """

    replies: Counter[int] = field(default_factory=Counter)
    left: int = 0
    answers: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    new_tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Client:
    """One client that behaves in all ways, one after the other."""

    def __init__(self, port: int, asked: list[dict[str, Any]], seen: Seen, rng: random.Random):
        self._port, self._asked, self._seen, self._rng = port, asked, seen, rng

    async def run(self, until: float) -> None:
        names, weights = list(BEHAVIOURS), list(BEHAVIOURS.values())
        while time.monotonic() < until:
            [name] = self._rng.choices(names, weights)
            try:
                await asyncio.wait_for(self._behave(name), STUCK)
            except asyncio.TimeoutError:
                self._seen.problems.append(f"{name}: stuck for {STUCK:g} s")
            except (OSError, asyncio.IncompleteReadError) as error:
                self._seen.problems.append(f"{name}: the connection broke: {error!r}")

    async def _behave(self, name: str) -> None:
        if name in ("whole", "streamed", "slow reader"):
            await self._answer(name)
        elif name.startswith("leaves"):
            await self._leave(before=name == "leaves before the answer")
        elif name == "burst":
            await asyncio.gather(*[self._answer("whole") for _ in range(QUEUE)])
        elif name == "malformed":
            await self._wrong(400, self._rng.choice(MALFORMED))
        elif name == "too large":
            await self._wrong(413, json.dumps({"model": "dolly", "x": "x" * MOST_BYTES}).encode())
        elif name == "wrong key":
            await self._wrong(401, json.dumps(self._asked[0]).encode(), key=self._rng.choice(["no", KEY + "x", None]))
        else:
            other = json.dumps(self._asked[0] | {"model": "other"}).encode()
            body, path = self._rng.choice([(b"{}", "/v1/embeddings"), (other, CHAT)])
            await self._wrong(404, body, path)

    async def _answer(self, name: str) -> None:
        number, stream = self._rng.randrange(len(self._asked)), name != "whole"
        body = self._asked[number] | ({"stream": True} if stream else {})
        begun = time.monotonic()
        # a slow reader takes little at a time, so that the server's buffers fill up
        async with Connection("127.0.0.1", self._port, 256 if name == "slow reader" else 1 << 16) as connection:
            await connection.send("POST", CHAT, json.dumps(body).encode(), KEY)
            reply = await connection.reply(whole=not stream)
            if await self._refused(reply):
                return
            if stream:
                text, reason = await self._read(reply, begun, name == "slow reader")
            else:
                [choice] = reply.json["choices"]
                text, reason = choice["message"]["content"], choice["finish_reason"]
                self._seen.new_tokens += reply.json["usage"]["completion_tokens"]
        self._seen.replies[200] += 1
        self._seen.answers[number, text, reason] += 1
        if name != "slow reader":
            self._seen.total.append(time.monotonic() - begun)

    async def _read(self, reply: Reply, begun: float, slowly: bool) -> tuple[str, str]:
        text, reason, latest, data = "", "", None, b""
        async for piece in reply.pieces():
            now = time.monotonic()
            if not slowly:
                (self._seen.first if latest is None else self._seen.between).append(now - (latest or begun))
            latest, data = now, data + piece
            if slowly:
                await asyncio.sleep(self._rng.uniform(0.0, 0.3))
        events = [line[6:] for line in data.decode().split("\n\n") if line]
        assert events[-1] == "[DONE]", data[-200:]
        for event in map(json.loads, events[:-1]):
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
        return text, reason

    async def _refused(self, reply: Reply) -> bool:
        if reply.status == 200:
            return False
        if not reply.body:
            reply.body = b"".join([piece async for piece in reply.pieces()])
        if reply.status != 429 or int(reply.headers["retry-after"]) < 1 or not reply.json["error"]["message"]:
            self._seen.problems.append(f"{reply.status} for a request that is right: {reply.body[:200]!r}")
        self._seen.replies[reply.status] += 1
        await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        return True

    async def _leave(self, before: bool) -> None:
        body = self._rng.choice(self._asked) | {"stream": not before, "max_tokens": 400}
        async with Connection("127.0.0.1", self._port) as connection:
            await connection.send("POST", CHAT, json.dumps(body).encode(), KEY)
            if before:
                await asyncio.sleep(self._rng.uniform(0.0, 0.2))
                self._seen.left += 1  # answered, refused or dropped: the server says which
                return
            reply = await connection.reply(whole=False)
            if await self._refused(reply):
                return
            pieces = reply.pieces()
            for _ in range(self._rng.randint(1, 5)):
                await anext(pieces)
            self._seen.left += 1

    async def _wrong(self, status: int, body: bytes, path: str = CHAT, key: str | None = KEY) -> None:
        async with Connection("127.0.0.1", self._port) as connection:
            await connection.send("POST", path, body, key)
            reply = await connection.reply()
        self._seen.replies[reply.status] += 1
        if reply.status != status or not isinstance(reply.json["error"]["message"], str):
            self._seen.problems.append(f"{reply.status} instead of {status} for {body[:60]!r}: {reply.body[:200]!r}")


@contextlib.contextmanager
def served(model: Path, log: Path, *flags: str) -> Iterator[tuple[int, psutil.Process]]:
    """Port and process of a server."""
    command = [sys.executable, "-m", "modelscope_dolly.cli", "serve", str(model), "--port", "0", "--device", "cpu"]
    command += ["--threads", "1", *flags]  # the clients need a core, too
    command += ["--api-key", KEY, "--slots", str(SLOTS), "--queue", str(QUEUE), "--max-body-bytes", str(MOST_BYTES)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file)
    try:
        while not (ready := re.search(r"^ready on http://127\.0\.0\.1:(\d+)$", log.read_text(), re.MULTILINE)):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()}")
            time.sleep(0.05)
        yield int(ready[1]), psutil.Process(process.pid)
    finally:
        process.terminate()
        if process.wait(timeout=60):
            raise RuntimeError(f"the server ended with {process.returncode}")


async def metrics(port: int) -> dict[str, float]:
    """Name, with labels -> value."""
    async with Connection("127.0.0.1", port) as connection:
        await connection.send("GET", "/metrics", key=KEY)
        lines = (await connection.reply()).body.decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def settled(port: int) -> dict[str, float]:
    """The metrics once nothing is in work. Raises RuntimeError if that does not come."""
    until = time.monotonic() + STUCK
    while time.monotonic() < until:
        found = await metrics(port)
        if found["dolly_slots_in_use"] == found["dolly_queue"] == 0:
            return found
        await asyncio.sleep(0.1)
    raise RuntimeError(f"{found['dolly_slots_in_use']:g} slots are still in use, {found['dolly_queue']:g} wait")


async def load(port: int, seconds: float, clients: int, seed: int) -> Seen:
    """All clients for so long."""
    seen, until, rng = Seen(), time.monotonic() + seconds, random.Random(seed)
    asked = questions()
    await asyncio.gather(*[Client(port, asked, seen, random.Random(rng.random())).run(until) for _ in range(clients)])
    return seen


async def compare_alone(port: int, seen: Seen) -> None:
    """Ask each question again, one at a time: every completed answer must be that one."""
    asked, expected = questions(), {}
    for number, body in enumerate(asked):
        async with Connection("127.0.0.1", port) as connection:
            await connection.send("POST", CHAT, json.dumps(body).encode(), KEY)
            [choice] = (await connection.reply()).json["choices"]
        expected[number] = choice["message"]["content"], choice["finish_reason"]
    wrong = [key for key in seen.answers if expected[key[0]] != key[1:]]
    if wrong:
        number, text, reason = wrong[0]
        seen.problems.append(
            f"{len(wrong)} answers differ from those alone, for instance {text!r} ({reason}), alone {expected[number]}"
        )


def compare_counts(before: dict[str, float], after: dict[str, float], seen: Seen) -> None:
    """What the server has counted beside what the clients have seen."""
    counted: Counter[str] = Counter()
    for name, value in after.items():
        if (match := re.match(r'dolly_requests_total\{.*outcome="(\w+)"', name)) and 'endpoint="/metrics"' not in name:
            counted[match[1]] += round(value - before.get(name, 0.0))
    expected = Counter({OUTCOMES[status]: count for status, count in seen.replies.items() if status != 200})
    for outcome in {*counted, *expected} - {"ok", "disconnected", "refused"}:
        if counted[outcome] != expected[outcome]:
            seen.problems.append(f"{outcome}: the server counts {counted[outcome]}, the clients {expected[outcome]}")
    # who leaves may have been answered or refused meanwhile
    extra = {
        name: counted[name] - seen_ for name, seen_ in (("ok", seen.replies[200]), ("refused", expected["refused"]))
    }
    if min(extra.values()) < 0 or sum(extra.values()) + counted["disconnected"] != seen.left:
        seen.problems.append(f"{seen.left} clients left; the server counts {dict(counted)}, the clients {seen.replies}")
    drawn = after["dolly_generated_tokens_total"] - before.get("dolly_generated_tokens_total", 0.0)
    if drawn < seen.new_tokens:
        seen.problems.append(f"{drawn:g} tokens were drawn, and clients have {seen.new_tokens}")


async def measure(port: int, process: psutil.Process, seconds: float, clients: int) -> dict[str, Any]:
    """Load after a warm-up, and all comparisons."""
    problems, memory = [], 0
    for number in range(WARM_UPS):  # until the allocator has what it keeps
        warm = await load(port, max(4.0, seconds / 15), clients, seed=100 + number)
        problems += warm.problems
        before = await settled(port)
        memory = max(memory, process.memory_info().rss)
    begun = time.monotonic()
    seen = await load(port, seconds, clients, seed=2)
    elapsed = time.monotonic() - begun
    after, grown = await settled(port), process.memory_info().rss / memory - 1
    compare_counts(before, after, seen)
    await compare_alone(port, seen)
    await settled(port)
    if grown > GROWTH:
        seen.problems.append(f"memory grew by {grown:.1%} from {memory / 1e6:.0f} MB")
    if not all(seen.replies[status] for status in (200, *OUTCOMES)) or not seen.left:
        seen.problems.append(f"not every case was met: {seen.replies}, {seen.left} left")
    requests = sum(seen.replies.values()) + seen.left
    return {
        "clients": clients, "seconds": elapsed, "requests": requests, "requests_per_s": requests / elapsed,
        "completed": seen.replies[200], "refused": seen.replies[429], "left": seen.left,
        "wrong": sum(seen.replies[status] for status in (400, 401, 404, 413)),
        "tokens_per_s": (after["dolly_generated_tokens_total"] - before["dolly_generated_tokens_total"]) / elapsed,
        "first_event_s": quantiles(seen.first), "between_events_s": quantiles(seen.between),
        "request_s": quantiles(seen.total), "memory_mb": memory / 1e6, "memory_growth": grown,
        "problems": [*problems, *seen.problems],
    }  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
    return {"p50": cuts[49], "p95": cuts[94], "max": max(values, default=0.0)}


def run(model: Path, log: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Start a server, load it and stop it."""
    with served(model, log) as (port, process):
        figures = asyncio.run(measure(port, process, seconds, clients))
    said = log.read_text()
    if "Traceback" in said:
        figures["problems"].append(f"the server's log has a traceback: {said[said.index('Traceback') :][:2000]}")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", type=Path, help="a checkpoint directory (default: the untrained nano model)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or Path(temporary) / "nano"
        if options.model is None:
            write_base(model)
        figures = run(model, Path(temporary) / "log.txt", options.seconds, options.clients)
    print(json.dumps(figures, indent=2))
    return 1 if figures["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
