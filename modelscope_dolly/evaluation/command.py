"""Options of `dolly eval`, and what the command does with them. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from modelscope_dolly.errors import SettingError


def add_options(parser: argparse.ArgumentParser, variable: str) -> None:
    """`variable` is the environment variable that names the model where the command line does not."""
    parser.add_argument("model", nargs="?", help=f"directory or hub id, of any architecture (default: ${variable})")
    parser.add_argument("--published", action="store_true", help="print the card's own table; needs no model")
    parser.add_argument("--verify-data", action="store_true", help="do the data give the card's requests? no model")
    parser.add_argument("--revision", help="tag or branch of the hub id (default: master)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="some of the seven (default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="first N documents of each task: NOT comparable")
    parser.add_argument("--data", metavar="DIR", help="directory with TASK.jsonl files (default: lm-eval downloads)")
    parser.add_argument("--batch-size", default="auto", metavar="auto|N", help="documents in one pass (default: auto)")
    parser.add_argument("--output", default="runs/eval", metavar="DIR", help="results and tables (default: runs/eval)")
    parser.add_argument("--check-against", choices=["card"], help="exit code 1 unless the card's row is reproduced")
    parser.add_argument("--row", help="the card's row to compare with (default: by the model's name)")
    parser.add_argument("--device", help="cpu, cuda:N, gpu or mps (default: first GPU, else CPU)")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32 (default: what suits the device)")
    parser.add_argument("--softmax-dtype", default="fp32", help="of the log-probabilities; model: as in 2023")
    parser.add_argument("--template", default="none", help="dolly: ask as instructions, another experiment")
    parser.add_argument("--scorer", default="auto", help="shared: each prefix once; hf: lm-eval's own (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace, model: str | None) -> int:
    """The exit code: 1 where data are not exact or the card is not reproduced, as asked for."""
    from modelscope_dolly.evaluation import results
    from modelscope_dolly.evaluation.rows import check_can_pass, published_rows, reference_row

    if options.published:
        rows = published_rows()
        print(json.dumps(results.as_json(rows), indent=2) if options.json else results.text_table(rows))
        return 0
    if options.verify_data:
        return _verify_data(options)
    if not model:
        raise SettingError("no model named: dolly eval DIRECTORY_OR_HUB_ID")
    reference = reference_row(options.row, model)
    if options.check_against:
        check_can_pass(model, reference, options.limit, options.template)
    from modelscope_dolly.evaluation.run import Settings, evaluate

    names = ("revision", "limit", "batch_size", "device", "dtype", "softmax_dtype", "template", "scorer")
    given = {name: getattr(options, name) for name in names}
    output = Path(options.output)
    found = evaluate(Settings(model, tasks=_tasks(options), data=_data(options), output=output, **given))
    return results.report(found, output, reference, bool(options.check_against), options.json)


def _tasks(options: argparse.Namespace) -> tuple[str, ...]:
    """Of --tasks, with spaces or commas between them; each once, in the card's order."""
    from modelscope_dolly.evaluation.published import NAMES

    given = [name for part in options.tasks or NAMES for name in part.split(",") if name]
    return tuple(sorted(set(given), key=lambda name: NAMES.index(name) if name in NAMES else -1))


def _data(options: argparse.Namespace) -> Path | None:
    return None if options.data is None else Path(options.data).expanduser()


def _verify_data(options: argparse.Namespace) -> int:
    from modelscope_dolly.evaluation.run import verify

    findings = verify(_tasks(options), _data(options))
    if options.json:
        print(json.dumps(findings, indent=2))
    else:
        for found in findings:
            verdict = "exact" if found["exact"] else f"NOT exact: {found['note']}"
            print(f"{found['task']:<15}{found['file']:<24}{verdict}")
    exact = {found["task"] for found in findings if found["exact"]}
    return 0 if exact == {found["task"] for found in findings} else 1
