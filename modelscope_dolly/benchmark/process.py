"""Each engine in a process of its own, so that its memory, threads and compiled kernels stay away from the next one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from modelscope_dolly.benchmark import peers
from modelscope_dolly.benchmark.bench_options import PEERS
from modelscope_dolly.benchmark.repeats import OtherLoad
from modelscope_dolly.errors import DollyError

if TYPE_CHECKING:
    import torch


def run_child(job: dict, program: str, device: torch.device, partial: Callable[[dict], object] | None = None) -> dict:
    """Run a job in a process of its own and return its result, with the load of other processes as `others_cpus`.

    Args:
        job: what to do; a peer's by peers.py, our own by worker.py.
        program: the Python that runs it, or a peer's own program.
        device: that is measured.
        partial: is called with all that is measured so far, whenever there is more of it.

    Raises:
        DollyError: it ended without a result; quotes its last line.
    """
    name = f"{job['engine']} {job['format']}"
    script = (peers.__file__,) if job["engine"] in PEERS else ("-m", "modelscope_dolly.benchmark.worker")
    command = [sys.executable if job["engine"] == "llamacpp" else program, *script]
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": _visible_devices(device),
        "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    load, final = OtherLoad(), {}
    with tempfile.TemporaryFile("w+") as errors:
        job = {**job, "spawned": time.time()}
        # A group of its own: what the engine starts ends with it, and Ctrl-C reaches this process alone.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended at once; its last line is quoted below
                print(json.dumps(job), file=process.stdin, flush=True)
            for line in process.stdout:
                message = _message(line, name)
                if partial and "partial" in message:
                    partial(message["partial"])
                elif message.keys() & {"result", "error"}:
                    final = message
            process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()] or ["it said nothing"]
    if "error" in final:
        raise DollyError(final["error"])
    if process.returncode or not final:
        raise DollyError(f"{name} ended with {process.returncode}: {said[-1][:200]}")
    return {**final["result"], "others_cpus": load.cpus()}


def _visible_devices(device: torch.device) -> str:
    """CUDA_VISIBLE_DEVICES for children: the one GPU that is measured, since not every engine takes its number."""
    if device.type != "cuda":
        return ""
    index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index].strip() if visible else str(index)


def _message(line: str, name: str) -> dict:
    """The JSON object that a child printed, or an empty one for other output; phases go to the progress line."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(message, dict):
        return {}
    if "phase" in message:
        progress(f"{name}: {message['phase']}")
    return message


def progress(text: str | None) -> None:
    """One line on a terminal, nothing in a log; None wipes it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text or ''}", end="", file=sys.stderr, flush=True)
