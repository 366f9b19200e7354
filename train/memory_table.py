"""How much memory training takes, measured beside what train.plan predicts, as a table for docs/training.md.

    python -m train.memory_table                                     all rows, about a quarter of an hour on two cores
    python -m train.memory_table --shapes nano --settings z0,lora    some of them

Random weights and the records of the nano recipe, two optimizer steps: in the second one all states exist. Each run has
processes of its own. On a CPU the peak of a process is that of its anonymous memory (RssAnon of /proc/PID/status: what
it allocated, without the pages of files), read every millisecond from before the base model is loaded to the end of the
last step, less what the process held before that (interpreter, libraries, records). glibc is told to give freed memory
back at once (MALLOC_MMAP_THRESHOLD_); left alone it keeps up to some 100 MB more. With a GPU it is what torch's
allocator had in use at most. Of several processes the largest counts.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.cli.parser import UsageParser
from modelscope_dolly.errors import DollyError, unknown_name
from modelscope_dolly.files import read_json, write_json
from train import finetune
from train.bench import machine
from train.config import Resolved, build
from train.distributed import rank, world_size
from train.nano import RECORDS, build_tokenizer, read_records
from train.planning.memory import GIB
from train.training.lora import add_adapters
from train.training.loss import CausalLMLoss

#: name -> (hidden size, layers, heads, vocabulary): the nano model, and pythia-70m and -160m with dolly's vocabulary.
SHAPES = {"nano": (192, 4, 6, 1536), "70m": (512, 6, 8, 50280), "160m": (768, 12, 12, 50280)}
#: name -> (processes, settings).
SETTINGS = {
    "z0": (1, {"zero_stage": "0"}),
    "z2": (2, {"zero_stage": "2"}),
    "z3": (2, {"zero_stage": "3"}),
    "lora": (1, {"zero_stage": "0", "lora": {"r": 16}}),
    "lora z2": (2, {"zero_stage": "2", "lora": {"r": 16}}),
    "qlora 8": (1, {"zero_stage": "0", "lora": {"r": 16, "bits": 8}}),
    "qlora 4": (1, {"zero_stage": "0", "lora": {"r": 16, "bits": 4}}),
}
#: Of every run.
_COMMON = {
    "max_steps": 2, "max_length": 512, "tokens_per_batch": 2048, "global_batch_size": 32, "test_size": 0,
    "eval_every": 0, "save_every": 10**9, "report_to": "none", "resume": "no", "checkpoint_activations": False,
}  # fmt: skip
#: glibc gives freed memory back at once: what is measured is what is in use, not what the allocator keeps for later.
_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_RESULT = "memory.{}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = UsageParser(prog="train.memory_table", description="Measure the memory of training.", allow_abbrev=False)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the processes that this one starts
    try:
        options = parser.parse_args(arguments)
        if options.measure:
            values = read_json(options.measure)
            return finetune.told_by_first("train.memory_table", lambda: measure(build(values)))
        shapes = _chosen("shape", options.shapes, SHAPES)
        settings = _chosen("setting", options.settings, SETTINGS)
        print(
            f"{machine()}\n\n| shape | setting | processes | predicted | measured | error |\n|---|---|---|---|---|---|"
        )
        with tempfile.TemporaryDirectory(prefix="dolly-memory-") as folder:
            for shape in shapes:
                write_base(shape, Path(folder) / shape)
                for name in settings:
                    print(row(shape, name, *run(Path(folder) / shape, name)), flush=True)
    except DollyError as error:
        print(f"train.memory_table: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _chosen(kind: str, text: str, known: dict) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise DollyError(unknown_name(kind, name, known))
    return names


def write_base(shape: str, target: Path) -> None:
    """A base model with random weights, and a tokenizer of the nano records with as many tokens as it has rows."""
    hidden, layers, heads, vocabulary = SHAPES[shape]
    tokenizer = build_tokenizer(read_records())
    missing = vocabulary - len(tokenizer.tokenizer)
    tokenizer.tokenizer.add_tokens([AddedToken(f"<unused {number}>") for number in range(missing)])
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    export_checkpoint(GPTNeoXForCausalLM(config), tokenizer, target)


def run(base: Path, name: str) -> tuple[int, int]:
    """(predicted, measured) bytes of one process."""
    processes, settings = SETTINGS[name]
    with tempfile.TemporaryDirectory(prefix="run-", dir=base.parent) as folder:
        values = {"model": str(base), "dataset": str(RECORDS), "output_dir": str(Path(folder) / "run")}
        write_json(Path(folder) / "recipe.json", values | _COMMON | settings)
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--nproc-per-node", str(processes), "--module"]
        command += ["train.memory_table", "--measure", str(Path(folder) / "recipe.json")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_AT_ONCE})
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise DollyError(f"the run {name} of {base.name} ended with {done.returncode}: {last[0]}")
        results = [read_json(Path(folder) / "run" / _RESULT.format(number)) for number in range(processes)]
    return results[0]["predicted"], max(result["measured"] for result in results)


def measure(resolved: Resolved) -> None:
    """Train in this process, and write what it took and what was predicted."""
    watch, load_base = MemoryWatch(), finetune.load_base

    def loading(*arguments, **keywords):
        rehearse(setup)
        watch.start()
        return load_base(*arguments, **keywords)

    finetune.load_base = loading
    setup = finetune.set_up(resolved)
    trained = finetune.train(setup)
    taken = setup.choice.taken
    result = {"predicted": taken.gpu or taken.host // world_size(), "measured": watch.stop()}
    write_json(Path(resolved.config.output_dir) / _RESULT.format(rank()), result)
    trained.trainer.accelerator.end_training()


def rehearse(setup: finetune.Setup) -> None:
    """One step of a tiny network, so that the libraries have loaded what they load at first use."""
    data = setup.data
    config = GPTNeoXConfig(
        vocab_size=data.network.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    network: torch.nn.Module = CausalLMLoss(GPTNeoXForCausalLM(config), data.batching.loss)
    network.network.set_attn_implementation(data.batching.attention)
    if data.lora:
        network = add_adapters(network, data.lora, data.tokenizer)
    optimizer = torch.optim.AdamW([weight for weight in network.parameters() if weight.requires_grad])
    batch = data.batching.collate(data.examples[:1], data.tokenizer.control.eos)
    network(**batch, label_total=1).loss.backward()
    optimizer.step()
    del network, optimizer
    gc.collect()


class MemoryWatch:
    """The most memory that this process takes between start and stop, in bytes above what it had."""

    def __init__(self):
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = self._peak = 0

    def start(self) -> None:
        self._before = self._peak = anonymous_memory()
        self._thread.start()

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._stopped.wait(0.001):
            self._peak = max(self._peak, anonymous_memory())


def anonymous_memory() -> int:
    """RssAnon of this process, in bytes (proc(5); Linux)."""
    return int(re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def row(shape: str, name: str, predicted: int, measured: int) -> str:
    """One row of the table."""
    error = 100 * (predicted - measured) / measured
    sizes = " | ".join(f"{size / GIB:.3f} GiB" for size in (predicted, measured))
    return f"| {shape} | {name} | {SETTINGS[name][0]} | {sizes} | {error:+.0f} % |"


if __name__ == "__main__":
    sys.exit(main())
