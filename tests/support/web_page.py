"""The web page of a tiny model, served by a process of its own, which tells how each answer ended.

A process, because gradio leaves event loops open and sets environment variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.training_runs import free_port

#: Seconds until something that should have happened counts as missing.
PATIENCE = 300


@dataclasses.dataclass
class Served:
    """A page that is being served.

    Attributes:
        url: ends with a slash.
        endings: of answers: "whole", or "cancelled" where the caller closed one before its end.
        hosts: names and addresses that the server's process has looked up.
    """

    url: str
    endings: queue.Queue[str]
    hosts: set[str]

    def ask(self, *values: Any) -> dict:
        """What the function for programs answers; {"error": ...} where it refuses."""
        body, kind = json.dumps({"data": values}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}gradio_api/call/ask", body, kind)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            event = json.load(response)["event_id"]
        with urllib.request.urlopen(f"{self.url}gradio_api/call/ask/{event}", timeout=PATIENCE) as response:
            kind, data = [line for line in response.read().decode().splitlines() if line][-2:]
        answer = json.loads(data.removeprefix("data: "))
        return answer[0] if kind == "event: complete" else answer


@contextlib.contextmanager
def serve(checkpoint: Path, *options: str) -> Iterator[Served]:
    """Serve the page of a checkpoint; the only option is "--mcp"."""
    command = [sys.executable, "-m", "tests.support.web_page", str(checkpoint), str(free_port()), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        try:
            served = Served("", queue.Queue(), set())
            while not served.url:
                line = process.stdout.readline()
                assert line, "the server did not start"
                _take(line, served)
            reader = threading.Thread(target=_read, args=(process, served), daemon=True)
            reader.start()
            yield served
        finally:
            process.kill()
            process.wait()
    reader.join()


def _read(process: subprocess.Popen, served: Served) -> None:
    for line in process.stdout:
        _take(line, served)


def _take(line: str, served: Served) -> None:
    kind, _, value = line.strip().partition(" ")
    if kind == "url":
        served.url = value
    elif kind == "ended":
        served.endings.put(value)
    else:
        served.hosts.add(value)


def main(checkpoint: str, port: str, *options: str) -> None:
    from modelscope_dolly.generation import GenerationSettings, Prompt, TextGenerator, Update
    from modelscope_dolly.load import load
    from modelscope_dolly.web import launch

    out = sys.stdout
    lookup = socket.getaddrinfo

    def noted(host: Any, *rest: Any, **keywords: Any) -> Any:
        print("host", host.decode() if isinstance(host, bytes) else host, file=out, flush=True)
        return lookup(host, *rest, **keywords)

    class Watched(TextGenerator):
        def stream(self, prompts: Sequence[Prompt], settings: GenerationSettings, slots: int) -> Iterator[Update]:
            end = "cancelled"
            try:
                for update in super().stream(prompts, settings, slots):
                    end = "whole" if update.finish_reason else end
                    yield update
            finally:
                print("ended", end, file=out, flush=True)

    socket.getaddrinfo = noted
    dolly = load(checkpoint, device="cpu")
    watched = Watched(dolly.text_generator.engine, dolly.text_generator.tokenizer)
    dolly = dataclasses.replace(dolly, text_generator=watched)
    with launch.serving(dolly, port=int(port), mcp="--mcp" in options) as page:
        print("url", page.local_url, file=out, flush=True)
        page.server.thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
