"""`dolly bench --serve`: clients of a server beside as many callers of the engine itself, and beside other servers.

Each client asks one streamed completion after another. Our server and the engine are measured in turn, each in a
process of its own, so that what changes on a shared machine meets both; a peer is measured once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.benchmark import peers
from modelscope_dolly.benchmark.bench_run import BenchRun, Variant
from modelscope_dolly.benchmark.peer_choice import missing_reason
from modelscope_dolly.benchmark.process import progress
from modelscope_dolly.benchmark.raw_http import Connection
from modelscope_dolly.errors import DollyError

if TYPE_CHECKING:
    from modelscope_dolly.engine.engine import Call

#: Requests of each client, one after the other; the first ones of a measurement are not counted.
REQUESTS = 4
NAME = "dolly"
#: Seconds for a server to load its model.
STARTS_WITHIN = 600.0


def measure(run: BenchRun) -> None:
    """`serve`: rows of the engine, our server and its peers by number of clients; and the peers that are missing."""
    rows: list[dict] = []
    part = run.results["serve"] = {"requests": REQUESTS, "rows": rows, "missing": {}}
    questions = [run.prompt() for _ in range(max(run.settings.serve))]
    run.expect(variant.format for variant in run.variants())
    for variant in run.variants():
        found: dict[str, list[list[dict]]] = {"engine": [], "server": []}
        for number in range(run.settings.repeats):
            progress(f"{variant.name}: {number + 1} of {run.settings.repeats}")
            job = {"clients": list(run.settings.serve), "questions": questions, "new_tokens": run.settings.new_tokens}
            found["engine"].append(run.child(variant, **job)["rows"])
            found["server"].append(_measure_server(run, _our_command(run, variant), questions))
        for name, repeats in found.items():
            rows += [_row(f"dolly {name}", variant.format, list(same)) for same in zip(*repeats, strict=True)]
        _compare(rows, variant.format)
        run.measured([variant.format])
    for peer in ("vllm", "llamacpp"):
        if run.settings.peers is not None and peer not in run.settings.peers:
            continue
        program = run.settings.peer_python.get(peer)
        if reason := _missing(run, peer, program):
            part["missing"][peer] = reason
            continue
        kind = Path(run.settings.gguf).stem if peer == "llamacpp" else run.dtypes[0]
        try:
            rows += [_row(peer, kind, [one]) for one in _measure_server(run, _peer_command(run, peer), questions)]
        except DollyError as error:
            part["missing"][peer] = str(error)


def _missing(run: BenchRun, peer: str, program: str | None) -> str | None:
    if peer == "llamacpp":
        there = program is not None and "server" in Path(program).name and run.settings.gguf is not None
        return None if there else "give --peer-python llamacpp=/path/llama-server and --gguf FILE"
    return missing_reason(run, peer, program)


def _our_command(run: BenchRun, variant: Variant) -> list[str]:
    most = str(max(run.settings.serve))
    command = [sys.executable, "-m", "modelscope_dolly.cli", "serve", str(run.model), "--slots", most]
    command += ["--device", "cpu" if run.device.type == "cpu" else str(run.device), "--threads", str(run.threads)]
    quantize = ["--quantize", variant.format] if variant.format in ("int8", "int4") else []
    return [*command, "--dtype", variant.dtype, *quantize, "--served-model-name", NAME]


def _peer_command(run: BenchRun, peer: str) -> list[str]:
    program, most = run.settings.peer_python[peer], max(run.settings.serve)
    longest = run.settings.prompt_tokens + run.settings.new_tokens + 8
    if peer == "llamacpp":
        command = [program, "--model", run.settings.gguf, "--threads", str(run.threads), "--parallel", str(most)]
        return [*command, "--ctx-size", str(most * longest), "--host", "127.0.0.1"]
    types = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    command = [program, "-m", "vllm.entrypoints.openai.api_server", "--model", str(run.model), "--host", "127.0.0.1"]
    command += ["--served-model-name", NAME, "--dtype", types[run.dtypes[0]], "--max-model-len", str(longest)]
    return [*command, *(["--enforce-eager"] if run.device.type == "cpu" else [])]


def _measure_server(run: BenchRun, command: list[str], questions: list[list[int]]) -> list[dict]:
    """One row for each number of clients. Raises DollyError for a server that does not start."""
    with _started(command, run.threads) as port:
        return [asyncio.run(_clients(port, questions[:count], run.settings.new_tokens)) for count in run.settings.serve]


@contextlib.contextmanager
def _started(command: list[str], threads: int) -> Iterator[int]:
    """The port of a server that answers."""
    with socket.socket() as free, tempfile.TemporaryFile("w+") as said:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=said, stderr=said, env=environment, start_new_session=True
        )
        try:
            until = time.monotonic() + STARTS_WITHIN
            while not asyncio.run(_healthy(port)):
                if process.poll() is not None or time.monotonic() > until:
                    said.seek(0)
                    lines = [line.strip() for line in said if line.strip()] or ["it said nothing"]
                    raise DollyError(f"{Path(command[0]).name} does not serve: {lines[-1][:200]}")
                time.sleep(0.1)
            yield port
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _healthy(port: int) -> bool:
    try:
        async with Connection("127.0.0.1", port) as connection:
            await connection.send("GET", "/health")
            return (await connection.reply()).status == 200
    except (OSError, asyncio.IncompleteReadError):
        return False


async def _clients(port: int, questions: list[list[int]], new_tokens: int) -> dict:
    """All clients at once, after a warm-up of one request each."""
    await asyncio.gather(*[_ask(port, ids, new_tokens, Timing()) for ids in questions])
    timing, begun = Timing(), time.perf_counter()

    async def client(ids: list[int]) -> None:
        for _ in range(REQUESTS):
            await _ask(port, ids, new_tokens, timing)

    await asyncio.gather(*[client(ids) for ids in questions])
    return timing.row(len(questions), time.perf_counter() - begun)


class Timing:
    """Seconds to the first token of each answer and between two of its tokens; and how many tokens came."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = 0

    def came(self, begun: float, latest: float | None) -> float:
        """A token, or several at once, of an answer that was asked for at `begun`; returns the time."""
        now = time.perf_counter()
        (self.first if latest is None else self.between).append(now - (begun if latest is None else latest))
        return now

    def row(self, clients: int, seconds: float) -> dict:
        return {
            "clients": clients, "requests_per_s": clients * REQUESTS / seconds, "tokens_per_s": self.tokens / seconds,
            **{f"{name}_{share}_s": _quantile(values, share) for name, values in
               (("first", self.first), ("between", self.between)) for share in ("p50", "p95")},
        }  # fmt: skip


def _quantile(values: list[float], share: str) -> float:
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else [*values, 0.0] * 19
    return cuts[9 if share == "p50" else 18]


async def _ask(port: int, ids: list[int], new_tokens: int, timing: Timing) -> None:
    body = {"model": NAME, "prompt": ids, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    begun, latest, rest = time.perf_counter(), None, b""
    async with Connection("127.0.0.1", port) as connection:
        await connection.send("POST", "/v1/completions", json.dumps(body).encode())
        reply = await connection.reply(whole=False)
        if reply.status != 200:
            text = b"".join([piece async for piece in reply.pieces()])
            raise DollyError(f"a server answers {reply.status}: {text[:200].decode(errors='replace')}")
        async for piece in reply.pieces():
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                news = json.loads(data)
                if news["choices"] and news["choices"][0].get("text"):
                    latest = timing.came(begun, latest)
                timing.tokens += (news.get("usage") or {}).get("completion_tokens", 0) if not news["choices"] else 0


def _row(name: str, kind: str, repeats: list[dict]) -> dict:
    """Medians of the repeats."""
    return {"engine": name, "format": kind} | {
        key: statistics.median(one[key] for one in repeats) for key in repeats[0]
    }


def _compare(rows: list[dict], kind: str) -> None:
    """Add each server row's share of the engine's tokens per second."""
    mine = [row for row in rows if row["format"] == kind]
    engine = {row["clients"]: row["tokens_per_s"] for row in mine if row["engine"] == "dolly engine"}
    for row in mine:
        row["share"] = row["tokens_per_s"] / engine[row["clients"]]


def run_clients(job: dict) -> dict:
    """In the child: as many callers of the engine, each with one request after the other, in one thread."""
    from modelscope_dolly.benchmark.own_engine import load_model

    generator, rows = load_model(job).text_generator, []
    for count in job["clients"]:
        peers.say(f"engine: {count} clients")
        for each in (1, REQUESTS):  # the first round warms up
            row = _callers(generator, job["questions"][:count], job["new_tokens"], each)
        rows.append(row)
    return {"rows": rows}


def _callers(generator, questions: list[list[int]], new_tokens: int, each: int) -> dict:
    from modelscope_dolly.engine.sampling import Sampling
    from modelscope_dolly.engine.sequence import Request

    engine, stop_ids = generator.engine, generator.tokenizer.control.stop
    timing, open_calls, left = Timing(), {}, [each] * len(questions)

    def ask(client: int) -> None:
        left[client] -= 1
        request = Request(questions[client], new_tokens, Sampling(do_sample=False), stop_ids)
        open_calls[engine.submit([request])] = [client, time.perf_counter(), None]

    def deliver(calls: set[Call]) -> None:
        for call in calls:
            state = open_calls[call]
            for token in call.take():
                timing.tokens += token.id not in stop_ids
                state[2] = timing.came(state[1], state[2])
                if token.finish_reason:
                    del open_calls[call]
                    if left[state[0]]:
                        ask(state[0])
        if not open_calls:
            engine.rest()

    begun = time.perf_counter()
    for client in range(len(questions)):
        ask(client)
    engine.work(deliver)
    return timing.row(len(questions), time.perf_counter() - begun)
