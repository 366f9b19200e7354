"""How fast `dolly eval` is against plain lm-eval: the same model, documents and machine, one after the other.

    python -m modelscope_dolly.evaluation.bench MODEL --data DIR --limit 100

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
from modelscope_dolly.evaluation.lm_eval_adapter import CardLM, SharedPrefixLM, Task, card_tasks, score
from modelscope_dolly.evaluation.published import NAMES
from modelscope_dolly.evaluation.subject import Subject, examine, load_model, load_tokenizer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="modelscope_dolly.evaluation.bench", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--data", type=Path, required=True, help="directory with TASK.jsonl files")
    parser.add_argument("--limit", type=int, default=50, help="documents per task (default: 50)")
    parser.add_argument("--tasks", nargs="+", default=NAMES, choices=NAMES, metavar="TASK")
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "8"], help="of plain lm-eval (default: 1 8)")
    parser.add_argument("--device", help="as for dolly eval")
    parser.add_argument("--dtype", help="as for dolly eval")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        found = compare(options)
    except DollyError as error:
        print(f"modelscope_dolly.evaluation.bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else report(found))
    return 0


def compare(options: argparse.Namespace) -> dict:
    """Seconds, tokens and padding of each way, and how far its log-likelihoods are from those of the first."""
    subject = examine(options.model, None, options.device, options.dtype)
    tokenizer, model = load_tokenizer(subject), load_model(subject)
    ways = {f"lm-eval, batch size {size}": (CardLM, size) for size in options.batch_sizes}
    ways["dolly eval, batch size auto"] = (SharedPrefixLM, "auto")
    rows, reference = {}, None
    with card_tasks(options.tasks, options.data) as tasks:
        first = tasks[options.tasks[0]][0]
        score(CardLM(model, tokenizer, "1", torch.float32, None), first, 2)  # what is done once per process
        for name, (kind, size) in ways.items():
            lm = kind(model, tokenizer, size, torch.float32, None)
            rows[name], values = _measure(lm, tasks, options.limit, plain=kind is CardLM)
            reference = values if reference is None else reference
            rows[name]["largest_difference"] = float((values - reference).abs().max())
    plain = min(row["seconds"] for name, row in rows.items() if name in ways and ways[name][0] is CardLM)
    ratio = plain / rows["dolly eval, batch size auto"]["seconds"]
    return {"machine": machine(subject), "limit": options.limit, "ways": rows, "times_as_fast": ratio}


def _measure(lm: CardLM, tasks: dict[str, Task], limit: int, plain: bool) -> tuple[dict, torch.Tensor]:
    began, values, seconds_of = time.perf_counter(), [], {}
    for name, (task, *_) in tasks.items():
        start = time.perf_counter()
        samples = score(lm, task, limit, plain)
        seconds_of[name] = time.perf_counter() - start
        values += [value for sample in samples for value, _ in sample["filtered_resps"]]
        task._instances = None  # the next way builds its requests anew
    seconds = time.perf_counter() - began
    row = {
        "seconds": seconds,
        "requests": len(values),
        "tokens_asked": lm.asked,
        "tokens_computed": lm.computed,
        "tokens_per_s": lm.asked / seconds,
        "padding_share": 1 - lm.useful / lm.computed,
        "seconds_of": seconds_of,
    }
    return row, torch.tensor(values, dtype=torch.float64)


def machine(subject: Subject) -> str:
    """Hardware and versions, for the record."""
    where = subject.device_name
    if subject.device.type == "cpu":
        where = f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads ({platform.machine()})"
    versions = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "torch", "transformers"))
    return f"{where}, {str(subject.dtype).removeprefix('torch.')}, {versions}, Python {platform.python_version()}"


def report(found: dict) -> str:
    """The comparison for people."""
    lines = [f"first {found['limit']} documents of each task; {found['machine']}", ""]
    lines.append(f"{'':<30}{'seconds':>9}{'tokens/s':>10}{'computed':>10}{'padding':>9}{'largest difference':>20}")
    for name, row in found["ways"].items():
        lines.append(
            f"{name:<30}{row['seconds']:>9.1f}{row['tokens_per_s']:>10,.0f}{row['tokens_computed']:>10,}"
            f"{100 * row['padding_share']:>7.1f} %{row['largest_difference']:>20.1e}"
        )
    lines += ["", f"dolly eval: {found['times_as_fast']:.2f} times as fast as the fastest of plain lm-eval"]
    lines.append("tokens/s counts the tokens of the requests, each on its own and without padding, in all rows")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
