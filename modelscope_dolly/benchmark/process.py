"""What every measurement of `dolly bench` needs: the weights on disk, and each engine in a process of its own.

Own processes keep memory, threads and compiled kernels of one engine away from the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from modelscope_dolly.benchmark import limits, peers
from modelscope_dolly.benchmark.options import ENGINES, BenchSettings
from modelscope_dolly.benchmark.synthetic import make_checkpoint, parse_shape
from modelscope_dolly.checkpoint.config import read_config
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.errors import DollyError, SettingError
from modelscope_dolly.hardware import DTYPES, choose_device, choose_threads, parse_dtype
from modelscope_dolly.load import choose_number_type


class Bench:
    """One call of the command.

    Attributes:
        settings: the checked flags.
        device, threads: where is measured.
        dtypes: names of the number types; the first is that of the yardstick.
        model, config: the checkpoint directory, inside `weights()`.
        scratch: directory for what peers convert.
        found: all that is measured, from the moment it is; `not_measured` in it names what is still to come.
    """

    def __init__(self, settings: BenchSettings, found: dict | None = None):
        self.settings = settings
        self.found = {} if found is None else found
        self.device = choose_device(settings.device).value
        if self.device.type == "mps":
            raise SettingError("dolly bench measures cpu and cuda:N, not mps; give --device cpu")
        self.threads = choose_threads(settings.threads).value
        self.dtypes = tuple(_short(parse_dtype(name)) for name in settings.dtypes)
        self.rng = random.Random(settings.seed)
        if settings.draft and not Path(settings.draft).is_dir():
            parse_shape(settings.draft)  # a mistake in it is told before minutes of work

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Find or make the checkpoint; what was made and is not to be kept goes when the block ends."""
        settings = self.settings
        with tempfile.TemporaryDirectory(prefix="dolly-bench-") as temporary:
            self.scratch = Path(temporary)
            if settings.model:
                self.model = locate(settings.model, settings.revision)
                self.config = read_config(self.model)
            else:
                place = Path(settings.keep) if settings.keep else self.scratch
                self.config, self.model = parse_shape(settings.shape), place / settings.shape
                self.scratch = place / f"{settings.shape}-peers" if settings.keep else self.scratch
                self.scratch.mkdir(parents=True, exist_ok=True)
                if not self.model.exists():
                    progress(f"making random weights of shape {settings.shape}")
                    make_checkpoint(self.config, self.model, settings.seed)
            if not self.dtypes:
                checkpoint = open_checkpoint(self.model, verify=False)
                self.dtypes = (_short(choose_number_type(checkpoint, self.device).value),)
            yield

    def expect(self, names: Iterable[str]) -> None:
        """Names of all that will be measured."""
        self.found["not_measured"] = list(names)

    def has(self, names: Iterable[str]) -> None:
        """These are measured."""
        measured = set(names)
        self.found["not_measured"] = [name for name in self.found["not_measured"] if name not in measured]

    def prompts(self, batch: int) -> list[list[int]]:
        return [self._ids(self.settings.prompt_tokens) for _ in range(batch)]

    def _ids(self, count: int) -> list[int]:
        # 4 and up: no end of text among them
        return [self.rng.randrange(4, min(self.config.vocab_size, 50000)) for _ in range(count)]

    def formats(self) -> list[tuple[str, str]]:
        """(format, number type) of each row of ours: the number types as they are, then the quantised ones."""
        plain = [(name, name) for name in self.dtypes] if "none" in self.settings.quantize else []
        return plain + [(name, self.dtypes[0]) for name in self.settings.quantize if name != "none"]

    def job(self, engine: str, number_format: str, **more: Any) -> dict:
        return {
            "engine": engine, "format": number_format, "model": str(self.model), "scratch": str(self.scratch),
            "device": "cuda:0" if self.device.type == "cuda" else "cpu",  # it sees no other, see child()
            "threads": self.threads, "repeats": self.settings.repeats, **more,
        }  # fmt: skip

    def child(self, job: dict, program: str = sys.executable, partial: Callable[[dict], object] | None = None) -> dict:
        """Run a job in a process of its own and give its result, with what disturbed it under `others_cpus`.

        Args:
            job: what to do.
            program: the Python of another engine.
            partial: is called with all that is measured so far, whenever there is more of it.

        Raises:
            DollyError: it ended without one; quotes its last line.
        """
        ours = job["engine"] not in ENGINES
        command = [program, *(("-m", "modelscope_dolly.benchmark.worker") if ours else (peers.__file__,))]
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": _visible(self.device),
            "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        watch = limits.Watch()
        with tempfile.TemporaryFile("w+") as errors:
            job = {**job, "spawned": time.time()}
            # A group of its own: what the engine starts ends with it, and Ctrl-C comes here alone.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                start_new_session=True,
            )  # fmt: skip
            found: dict = {}
            try:
                with contextlib.suppress(BrokenPipeError):  # it ended at once; its last words are told below
                    print(json.dumps(job), file=process.stdin, flush=True)
                for line in process.stdout:
                    message = _message(line, f"{job['engine']} {job['format']}")
                    found = found if message is None or "partial" in message else message
                    if partial and message and "partial" in message:
                        partial(message["partial"])
                process.wait()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                process.stdout.close()
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if line.strip()]
        if "error" in found:
            raise DollyError(found["error"])
        if process.returncode or not found:
            last = said[-1].strip()[:200] if said else "it said nothing"
            raise DollyError(f"{job['engine']} {job['format']} ended with {process.returncode}: {last}")
        return {**found["result"], "others_cpus": watch.others()}


def _short(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def _visible(device: torch.device) -> str:
    """CUDA_VISIBLE_DEVICES for children: the one GPU that is measured, since not every engine takes its number."""
    if device.type != "cuda":
        return ""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[device.index or 0].strip() if seen else str(device.index or 0)


def _message(line: str, subject: str) -> dict | None:
    """Figures or an error that a child printed; its phases go to the progress line, its other words nowhere."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    if not isinstance(message, dict):
        return None
    if "phase" in message:
        progress(f"{subject}: {message['phase']}")
    return message if message.keys() & {"result", "partial", "error"} else None


def progress(text: str | None) -> None:
    """One line on a terminal, nothing in a log; None wipes it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text or ''}", end="", file=sys.stderr, flush=True)
