"""How fast `dolly eval` is against plain lm-eval: the same model, documents and machine, one after the other.

    python -m modelscope_dolly.evaluation.scorer_speed MODEL --data DIR --limit 100

Plain is what `lm_eval --model hf` runs, its HFLM, with the batch sizes given; its default is 1. Loading the model
is in no figure; reading texts, tokenizing and scoring are in all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from modelscope_dolly.errors import DollyError
from modelscope_dolly.evaluation.lm_eval_adapter import CardLM, LoadedTask, SharedPrefixLM, card_tasks, score
from modelscope_dolly.evaluation.model_under_test import ModelUnderTest, find_model, load_network, load_tokenizer
from modelscope_dolly.evaluation.published import TASK_NAMES
from modelscope_dolly.evaluation.tables import align
from modelscope_dolly.hardware import dtype_name

_OURS = "dolly eval, batch size auto"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="modelscope_dolly.evaluation.scorer_speed", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--data", type=Path, required=True, help="directory with TASK.jsonl files")
    parser.add_argument("--limit", type=int, default=50, help="documents per task (default: 50)")
    parser.add_argument("--tasks", nargs="+", default=TASK_NAMES, choices=TASK_NAMES, metavar="TASK")
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "8"], help="of plain lm-eval (default: 1 8)")
    parser.add_argument("--device", help="as for dolly eval")
    parser.add_argument("--dtype", help="as for dolly eval")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        results = compare(options)
    except DollyError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, indent=2) if options.json else format_comparison(results))
    return 0


def compare(options: argparse.Namespace) -> dict:
    """Seconds, tokens and padding of each way, and how far its log-likelihoods are from those of the first."""
    model = find_model(options.model, None, options.device, options.dtype)
    tokenizer, network = load_tokenizer(model), load_network(model)
    ways = {f"lm-eval, batch size {size}": (CardLM, size) for size in options.batch_sizes}
    rows, reference = {}, None
    with card_tasks(options.tasks, options.data) as tasks:
        warm_up = CardLM(network, tokenizer, "1", torch.float32, None)  # pays for what is done once per process
        score(warm_up, tasks[options.tasks[0]].task, 2)
        for name, (lm_class, size) in {**ways, _OURS: (SharedPrefixLM, "auto")}.items():
            lm = lm_class(network, tokenizer, size, torch.float32, None)
            rows[name], values = _measure(lm, tasks, options.limit, plain=lm_class is CardLM)
            reference = values if reference is None else reference
            rows[name]["largest_difference"] = float((values - reference).abs().max())
    ratio = min(rows[name]["seconds"] for name in ways) / rows[_OURS]["seconds"]
    return {"machine": _machine(model), "limit": options.limit, "ways": rows, "times_as_fast": ratio}


def _measure(lm: CardLM, tasks: dict[str, LoadedTask], limit: int, plain: bool) -> tuple[dict, torch.Tensor]:
    values, seconds_of = [], {}
    for name, loaded in tasks.items():
        start = time.perf_counter()
        samples = score(lm, loaded.task, limit, plain)
        seconds_of[name] = time.perf_counter() - start
        values += [value for sample in samples for value, _ in sample["filtered_resps"]]
        loaded.task._instances = None  # the next way builds its requests again
    row = {**lm.counts.speed(sum(seconds_of.values())), "seconds_of": seconds_of}
    return row, torch.tensor(values, dtype=torch.float64)


def _machine(model: ModelUnderTest) -> str:
    """Hardware and versions."""
    device = model.device_name
    if model.device.type == "cpu":
        device = f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads ({platform.machine()})"
    versions = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "torch", "transformers"))
    return f"{device}, {dtype_name(model.dtype)}, {versions}, Python {platform.python_version()}"


def format_comparison(results: dict) -> str:
    """The comparison as text."""
    table = [("", "seconds", "tokens/s", "computed", "padding", "largest difference")]
    table += [
        (name, f"{row['seconds']:.1f}", f"{row['tokens_per_s']:,.0f}", f"{row['tokens_computed']:,}",
         f"{100 * row['padding_share']:.1f} %", f"{row['largest_difference']:.1e}")
        for name, row in results["ways"].items()
    ]  # fmt: skip
    return "\n".join([
        f"first {results['limit']} documents of each task; {results['machine']}", "", *align(table), "",
        f"dolly eval: {results['times_as_fast']:.2f} times as fast as the fastest of plain lm-eval",
        "tokens/s counts the tokens of the requests, each on its own and without padding, in all rows",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
