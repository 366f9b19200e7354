"""Tiny runs of the recipe: a base model of two layers, 40 short records, and processes that can be killed.

Processes are forked from a server that has imported everything once: a run then takes a second or two instead of ten.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from modelscope_dolly.checkpoint.tokenizer import read_tokenizer
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.prompt import DollyTokenizer
from tests.support.paths import ROOT
from train.nano import build_tokenizer, read_records

RECORDS, HELD_OUT = 40, 8
RECIPE = {
    "max_length": 512,
    "tokens_per_batch": 512,
    "test_size": HELD_OUT,
    "epochs": 4,
    "global_batch_size": 8,
    "learning_rate": 1.0e-3,
    "warmup_steps": 5,
    "save_every": 3,
    "eval_every": 4,
    "report_to": "none",
    "checkpoint_activations": False,
    "compare_records": 0,  # tests/train/training/test_before_after.py does it once
}
STEPS = 16
LIMIT = 120  # seconds until a run counts as hanging

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["train.finetune", "deepspeed"])


def _kept_folder() -> Path:
    """For what several tests read; removed when all have run."""
    folder = Path(tempfile.mkdtemp(prefix="training_runs."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def material() -> Path:
    """A folder with a base model, `base`, and records, `records.jsonl`; nobody writes into it."""
    folder = _kept_folder()
    records = sorted(read_records(), key=lambda record: sum(map(len, record.values())))[:RECORDS]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = build_tokenizer(records, vocabulary=768)
    _export_base(tokenizer, folder / "base", width=32, heads=4)
    return folder


def _export_base(tokenizer: DollyTokenizer, target: Path, width: int, heads: int) -> None:
    """A base model of two layers with random weights, always the same."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer.tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    export_checkpoint(GPTNeoXForCausalLM(config), tokenizer, target)


def memorised(folder: Path) -> Path:
    """The result of a run of the recipe in `folder`: a small model that knows most of the 40 records by heart.

    Its heads are 64 wide: the attention of vLLM on CPUs refuses those of our other test models.
    """
    _export_base(read_tokenizer(material() / "base"), folder / "base", width=128, heads=2)
    changes = {"model": str(folder / "base"), "test_size": 0, "epochs": 60, "learning_rate": 3e-3, "save_every": 1000}
    complete(write_recipe(folder, **changes))
    return folder / "run" / "final"


def write_recipe(folder: Path, **changes) -> Path:
    """recipe.yaml in `folder`, whose run goes to `folder/run`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "model": str(material() / "base"),
        "dataset": str(material() / "records.jsonl"),
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**given, **RECIPE, **changes}))
    return folder / "recipe.yaml"


class Processes:
    """The ranks of one run; what they print goes to files beside the recipe."""

    def __init__(self, recipe: Path, *flags: str, world: int = 1, before: Callable[[], None] | None = None):
        self.folder = recipe.parent
        port = free_port()
        self.ranks = [
            _server.Process(target=_rank, args=(rank, world, port, [str(recipe), *flags], self.folder, before))
            for rank in range(world)
        ]
        for rank in self.ranks:
            rank.daemon = True  # does not outlive a test that failed
            rank.start()

    def wait(self) -> list[int]:
        """Exit codes. As a launcher does, ends the other ranks when one has failed and they do not end themselves."""
        deadline = time.monotonic() + LIMIT
        while running := [rank for rank in self.ranks if rank.is_alive()]:
            if not wait([rank.sentinel for rank in running], timeout=deadline - time.monotonic()):
                self.kill()
                pytest.fail(f"still running after {LIMIT} s:\n{self.stdout()}\n{self.stderr()}")
            if any(rank.exitcode for rank in self.ranks):
                deadline = min(deadline, time.monotonic() + 20)
        return [rank.exitcode for rank in self.ranks]

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl tells of this step."""
        path = self.folder / "run" / "metrics.jsonl"
        while not path.exists() or f'"step": {step},' not in path.read_text():
            self.ranks[0].join(0.005)
            assert self.ranks[0].is_alive(), f"ended before step {step}:\n{self.stdout()}\n{self.stderr()}"

    def kill(self) -> None:
        """kill -9, all ranks."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()

    def stdout(self, rank: int = 0) -> str:
        return (self.folder / f"stdout.{rank}").read_bytes().decode()

    def stderr(self, rank: int = 0) -> str:
        return (self.folder / f"stderr.{rank}").read_bytes().decode()


def _rank(rank: int, world: int, port: int, arguments: list[str], folder: Path, before: Callable | None) -> NoReturn:
    """What one process does: `python -m train.finetune` with what a launcher puts into its environment."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / f"{name}.{rank}", "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if before:
        before()
    from train.finetune import main

    sys.exit(main(arguments))


def pause_at(step: int) -> None:
    """Keep the last rank, and so all, from getting further than this step before a signal has come."""
    from train.training.callbacks import MetricsFile

    arrived, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.detach())
    log = MetricsFile.on_log

    def on_log(self, args, state, control, logs=None, **keywords):
        log(self, args, state, control, logs, **keywords)
        if state.global_step == step and "loss" in logs and args.process_index == args.world_size - 1:
            arrived.recv(1)

    MetricsFile.on_log = on_log


def complete(recipe: Path, *flags: str, world: int = 1, before: Callable[[], None] | None = None) -> Processes:
    """Run to the end, which must be a good one."""
    processes = Processes(recipe, *flags, world=world, before=before)
    assert processes.wait() == [0] * world, processes.stdout() + processes.stderr()
    return processes


def launch(*command: str) -> subprocess.CompletedProcess:
    """A command in a fresh interpreter, as a user types it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )


def torchrun(world: int, recipe: Path, *flags: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(free_port())]
    return launch(*launcher, "--module", "train.finetune", str(recipe), *flags)


def finished(world: int = 1, zero_stage: str = "auto") -> Path:
    """The directory of an uninterrupted run of the recipe, made by the usual command; nobody writes into it."""
    return _finished(world, zero_stage)  # the cache takes f() and f(1) for two things


@functools.cache
def _finished(world: int, zero_stage: str) -> Path:
    recipe = write_recipe(_kept_folder(), zero_stage=zero_stage)
    if world == 1:
        done = launch("-m", "train.finetune", str(recipe))
    else:
        done = torchrun(world, recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    (recipe.parent / "stdout").write_text(done.stdout)
    (recipe.parent / "stderr").write_text(done.stderr)
    return recipe.parent / "run"


def as_earlier_versions_marked(checkpoint: Path) -> None:
    """Rewrite complete.json as it was before it had digests and settings."""
    marker = json.loads((checkpoint / "complete.json").read_text())
    files = {name: entry["size"] for name, entry in marker["files"].items()}
    kept = {name: marker[name] for name in ("step", "world", "plan_hash", "order_hash")}
    (checkpoint / "complete.json").write_text(json.dumps({**kept, "files": files}, indent=2) + "\n")


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "useful_tokens_per_s")}
        for line in lines
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
