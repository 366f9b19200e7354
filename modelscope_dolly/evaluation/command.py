"""Options of `dolly eval`, and what the command does with them. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from modelscope_dolly.errors import SettingError
from modelscope_dolly.files import path_of

if TYPE_CHECKING:
    from modelscope_dolly.evaluation.own_tasks import OwnTaskResult


def add_options(parser: argparse.ArgumentParser, variable: str) -> None:
    """`variable` is the environment variable that names the model where the command line does not."""
    parser.add_argument("model", nargs="?", help=f"directory or hub id, of any architecture (default: ${variable})")
    parser.add_argument("--published", action="store_true", help="print the card's own table; needs no model")
    parser.add_argument("--verify-data", action="store_true", help="do the data give the card's requests? no model")
    parser.add_argument("--revision", help="tag or branch of the hub id (default: master)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK",
                        help="some of the seven (default: all); of lm-eval; or files .jsonl, .yaml")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="first N documents of each task: NOT comparable")
    parser.add_argument("--data", metavar="DIR", help="directory with TASK.jsonl files (default: lm-eval downloads)")
    parser.add_argument("--batch-size", default="auto", metavar="auto|N", help="documents in one pass (default: auto)")
    parser.add_argument("--output", default="runs/eval", metavar="DIR", help="results and tables (default: runs/eval)")
    parser.add_argument("--check-against", choices=["card"], help="exit code 1 unless the card's row is reproduced")
    parser.add_argument("--row", help="the card's row to compare with (default: by the model's name)")
    parser.add_argument("--device", help="cpu, cuda:N or gpu (default: first GPU, else CPU)")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32 (default: what suits the device)")
    parser.add_argument("--softmax-dtype", default="fp32", help="of the log-probabilities; model: as in 2023")
    parser.add_argument("--template", default="none", help="dolly: ask as instructions, another experiment")
    parser.add_argument("--scorer", default="auto", help="shared: each prefix once; hf: lm-eval's own (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace, model: str | None) -> int:
    """The exit code: 1 where data are not exact or the card is not reproduced, as asked for."""
    from modelscope_dolly.evaluation import tables
    from modelscope_dolly.evaluation.comparison import check_can_pass, published_rows, reference_row
    from modelscope_dolly.evaluation.published import TASK_NAMES

    if options.published:
        rows = published_rows()
        print(json.dumps(tables.as_json(rows), indent=2) if options.json else tables.text_table(rows))
        return 0
    # --tasks takes spaces or commas between names; each counts once, in the card's order, unknown ones first
    names = {name for part in options.tasks or TASK_NAMES for name in part.split(",") if name}
    tasks = tuple(name for name in TASK_NAMES if name in names)
    own = tuple(sorted(names.difference(TASK_NAMES)))
    data = None if options.data is None else Path(path_of("--data", options.data))
    if options.verify_data:
        return _verify_data(tasks + own, data, options.json)
    if not model:
        raise SettingError("no model named: dolly eval DIRECTORY_OR_HUB_ID")
    reference = reference_row(options.row, model)
    if options.check_against:
        check_can_pass(model, reference, options.limit, options.template)
    from modelscope_dolly.evaluation.evaluate import EvalSettings, evaluate, evaluate_own

    values = {name: getattr(options, name, None) for name in EvalSettings.__dataclass_fields__}
    values |= {"model": model, "tasks": tasks, "own": own, "data": data}
    settings = EvalSettings(**values | {"output": Path(path_of("--output", options.output))})
    if own:
        results = evaluate_own(settings)
        if not tasks:
            return _print_own(results, settings.output, options.json)
        _print_own(results, settings.output, False, sys.stderr if options.json else sys.stdout)
    run = evaluate(settings)[0].run
    return tables.print_results(run, settings.output, reference, bool(options.check_against), options.json)


def _print_own(results: Sequence[OwnTaskResult], output: Path, as_json: bool, stream: TextIO | None = None) -> int:
    """The tasks that are not of the card, in a table of their own."""
    from modelscope_dolly.evaluation import own_tasks

    files = own_tasks.write_tables(output)
    if as_json:
        rows = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"own": rows, "files": list(map(str, files))}, indent=2))
    else:
        print(own_tasks.text_table(results), f"written: {', '.join(map(str, files))}", sep="\n", file=stream)
    return 0


def _verify_data(tasks: tuple[str, ...], data: Path | None, as_json: bool) -> int:
    from modelscope_dolly.evaluation.evaluate import verify

    findings = verify(tasks, data)
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        for finding in findings:
            verdict = "exact" if finding["exact"] else f"NOT exact: {finding['note']}"
            print(f"{finding['task']:<15}{finding['file']:<24}{verdict}")
    exact = {finding["task"] for finding in findings if finding["exact"]}
    return 0 if exact == {finding["task"] for finding in findings} else 1
