"""How much faster than the 2023 loop: the same records and steps, both through the whole recipe, one after the other.

    python -m train.bench train/recipes/dolly-v2-3b.yaml --steps 10

Each run is a process of its own, with checkpoints and evaluation off. The first step of each is left out of its
figures: it includes one-time costs. Speed is that of the median step, and counts useful tokens, those of records;
padding is not useful. Padded batches recompute activations, as the script of 2023 does; packed ones where the memory
requires it. `--checkpoint-activations true` or `false` makes both do the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from modelscope_dolly.cli.exit_codes import exit_code
from modelscope_dolly.cli.parser import UsageParser
from modelscope_dolly.errors import DollyError
from modelscope_dolly.files import read_json, write_atomically
from train.config import Resolved, TrainConfig, add_flags, flag, resolve
from train.data.padded import padded_batch, padded_batch_size, padded_plan
from train.distributed import world_size
from train.finetune import set_up, told_by_first, train
from train.planning.hardware import gib
from train.prepare import Batching
from train.recipe_file import shown
from train.training.loss import summed_cross_entropy
from train.training.report import read_metrics

MODES = ("padded", "packed")
PEAK = "peak.json"
MOST_STEPS, MOST_PROCESSES = 10_000, 1024
#: Settings that a measurement gives itself.
_FIXED = {"save_every": str(10**9), "eval_every": "0", "report_to": "none", "resume": "no", "patience": "0",
          "final_from": "last", "max_hours": "0"}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = UsageParser(prog="train.bench", description="Compare with padded batches.", allow_abbrev=False)
    add_flags(parser)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run (default: 10)")
    parser.add_argument("--processes", type=int, default=1, help="processes of each run, by torchrun (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)  # in the processes that this one starts

    def command() -> int:
        options = parser.parse_args(arguments)
        if options.measure:
            return told_by_first("train.bench", lambda: measure(resolve(options), options.measure))
        config = resolve(options).config
        if not 2 <= options.steps <= MOST_STEPS:
            allowed = f"at least 2, of which the first is not counted, and at most {MOST_STEPS:,}"
            raise DollyError(f"--steps is {shown(options.steps)}, it must be {allowed}")
        if not 1 <= options.processes <= MOST_PROCESSES:
            found = shown(options.processes)
            raise DollyError(f"--processes is {found}, it must be at least 1 and at most {MOST_PROCESSES}")
        results = {mode: run_mode(config, options, mode) for mode in MODES}
        if options.json:
            print(json.dumps({"machine": machine(), **results}, indent=2))
        else:
            print(comparison(results, options.steps))
        return 0

    return exit_code(command, "train.bench")


def padded(records_per_batch: int) -> Batching:
    """The 2023 loop: rows padded to their longest record, transformers' own attention, logits of every token."""
    return Batching(padded_plan, records_per_batch, padded_batch, "sdpa", all_logits_loss)


def all_logits_loss(network: Any, inputs: dict[str, Any], labels: torch.Tensor, label_total: int) -> torch.Tensor:
    """loss.response_loss as in 2023: the head runs on every token, and the loss ignores most of its logits."""
    logits = network.lm_head(network.gpt_neox(**inputs).last_hidden_state)
    return summed_cross_entropy(logits.flatten(0, 1), labels.flatten()) / label_total


def measure(resolved: Resolved, mode: str) -> None:
    """Train in this process as far as the metrics: nothing is exported or published."""
    size = padded_batch_size(resolved.config.global_batch_size, world_size())
    trainer = train(set_up(resolved, padded(size) if mode == "padded" else None)).trainer
    if trainer.args.process_index == 0:
        write_atomically(Path(resolved.config.output_dir) / PEAK, json.dumps({"bytes": peak_memory()}) + "\n")
    trainer.accelerator.end_training()


def run_mode(config: TrainConfig, options: argparse.Namespace, mode: str) -> dict:
    """Run the recipe in one mode, in processes of its own, and read its metrics."""
    with tempfile.TemporaryDirectory(prefix="dolly-bench-") as directory:
        run = Path(directory) / "run"
        settings = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__}
        settings |= {**_FIXED, "output_dir": str(run), "max_steps": str(options.steps)}
        if mode == "padded" and config.checkpoint_activations == "auto":
            settings["checkpoint_activations"] = "true"
        command = [sys.executable, "-m"]
        if options.processes > 1:
            command += ["torch.distributed.run", "--nproc-per-node", str(options.processes), "--module"]
        command += ["train.bench", str(options.recipe), "--measure", mode]
        command += [word for name, value in settings.items() if value is not None for word in (flag(name), value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise DollyError(f"the {mode} run ended with {done.returncode}: {last[0]}")
        steps, _ = read_metrics(run)
        peak = read_json(run / PEAK)["bytes"]
    counted = steps[1:]
    rates = [step["useful_tokens_per_s"] for step in counted]
    return {
        "useful_tokens": sum(step["tokens"] for step in counted),
        "seconds": sum(step["seconds"] for step in counted),
        "useful_tokens_per_s": statistics.median(rates),
        "slowest_and_fastest": [min(rates), max(rates)],
        "median_step_s": statistics.median(step["seconds"] for step in counted),
        "peak_bytes": peak,
        "losses": [step["loss"] for step in steps],
    }


def peak_memory() -> int:
    """Most bytes this process ever held: of GPU memory where there is a GPU, else of memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> str:
    """Hardware and versions, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def comparison(results: dict[str, dict], steps: int) -> str:
    """The comparison for people."""
    lines = [f"{steps} steps each, the first not counted, medians; {machine()}", ""]
    lines.append(f"{'':<8}{'useful tok/s':>14}{'slowest-fastest':>18}{'step':>9}{'peak memory':>14}{'last loss':>11}")
    for mode, result in results.items():
        spread = "-".join(f"{rate:,.0f}" for rate in result["slowest_and_fastest"])
        lines.append(
            f"{mode:<8}{result['useful_tokens_per_s']:>14,.0f}{spread:>18}"
            f"{result['median_step_s']:>7.2f} s{gib(result['peak_bytes']):>14}{result['losses'][-1]:>11.4f}"
        )
    before, now = (results[mode] for mode in MODES)
    ratio = now["useful_tokens_per_s"] / before["useful_tokens_per_s"]
    memory = before["peak_bytes"] / now["peak_bytes"]
    lines += ["", f"packed: {ratio:.2f} times the useful tokens per second, 1/{memory:.2f} of the memory"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
