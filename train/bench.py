"""How much faster than the 2023 loop: the same records and steps, both through the whole recipe, one after the other.

    python -m train.bench train/recipes/dolly-v2-3b.yaml --steps 10

Each run is a process of its own, with checkpoints and evaluation off. The first step of each is left out of its
figures: it pays for what is done once. Speed is that of the median step, and counts useful tokens, those of records;
padding is not useful. Padded batches recompute activations, as the script of 2023 does; packed ones where the memory
asks for it. `--checkpoint-activations true` or `false` makes both do the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from modelscope_dolly.errors import DollyError
from train.config import Parser, TrainConfig, add_flags, flag, resolve

MODES = ("padded", "packed")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("train.bench", "Compare with padded batches.")
    add_flags(parser)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run (default: 10)")
    parser.add_argument("--processes", type=int, default=1, help="processes of each run, by torchrun (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        options = parser.parse(arguments)
        config = resolve(options).config
        if options.steps < 2:
            raise DollyError(f"--steps is {options.steps}, it must be at least 2: the first is not counted")
        rows = {mode: measure(config, options, mode) for mode in MODES}
    except DollyError as error:
        print(f"train.bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"machine": machine(), **rows}, indent=2) if options.json else report(rows, options.steps))
    return 0


def measure(config: TrainConfig, options: argparse.Namespace, mode: str) -> dict:
    """Run the recipe in one mode and read its metrics."""
    with tempfile.TemporaryDirectory(prefix="dolly-bench-") as directory:
        run = Path(directory) / "run"
        command = [sys.executable, "-m"]
        if options.processes > 1:
            command += ["torch.distributed.run", "--nproc-per-node", str(options.processes), "--module"]
        command += ["train.finetune", str(options.recipe), *_overrides(options)]
        command += ["--output-dir", str(run), "--batching", mode, "--max-steps", str(options.steps)]
        if mode == "padded" and config.checkpoint_activations == "auto":
            command += ["--checkpoint-activations", "true"]
        command += ["--save-every", str(10**9), "--eval-every", "0", "--report-to", "none", "--resume", "no"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DOLLY_BENCH": "1"})
        if done.returncode:
            raise DollyError(f"the {mode} run ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        peak = json.loads((run / "peak.json").read_text())["bytes"]
    steps = [row for row in rows if "loss" in row][1:]
    rates = [row["tokens"] / row["seconds"] for row in steps]
    return {
        "useful_tokens": sum(row["tokens"] for row in steps),
        "seconds": sum(row["seconds"] for row in steps),
        "useful_tokens_per_s": statistics.median(rates),
        "slowest_and_fastest": [min(rates), max(rates)],
        "median_step_s": statistics.median(row["seconds"] for row in steps),
        "peak_bytes": peak,
        "losses": [row["loss"] for row in rows if "loss" in row],
    }


def _overrides(options: argparse.Namespace) -> list[str]:
    """The settings given as flags, handed on."""
    mine = {"output_dir", "batching", "max_steps", "save_every", "eval_every", "report_to", "resume"}
    names = [name for name in TrainConfig.__dataclass_fields__ if name not in mine]
    given = [(name, getattr(options, name)) for name in names if getattr(options, name) is not None]
    return [part for name, value in given for part in (flag(name), value)]


def peak_memory() -> int:
    """Most bytes this process ever held: of GPU memory where there is a GPU, else of memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> str:
    """Hardware and versions, for the record."""
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{place}, torch {torch.__version__}, Python {platform.python_version()}"


def report(rows: dict[str, dict], steps: int) -> str:
    """The comparison for people."""
    lines = [f"{steps} steps each, the first not counted, medians; {machine()}", ""]
    lines.append(f"{'':<8}{'useful tok/s':>14}{'slowest-fastest':>18}{'step':>9}{'peak memory':>14}{'last loss':>11}")
    for mode, row in rows.items():
        spread = "-".join(f"{rate:,.0f}" for rate in row["slowest_and_fastest"])
        lines.append(
            f"{mode:<8}{row['useful_tokens_per_s']:>14,.0f}{spread:>18}"
            f"{row['median_step_s']:>7.2f} s{row['peak_bytes'] / 2**30:>10.2f} GiB{row['losses'][-1]:>11.4f}"
        )
    ratio = rows["packed"]["useful_tokens_per_s"] / rows["padded"]["useful_tokens_per_s"]
    memory = rows["padded"]["peak_bytes"] / rows["packed"]["peak_bytes"]
    lines += ["", f"packed: {ratio:.2f} times the useful tokens per second, 1/{memory:.2f} of the memory"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
