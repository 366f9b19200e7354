"""`dolly batch`: answer many instructions from a file into a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from modelscope_dolly.cli.bench import interrupt_once
from modelscope_dolly.cli.options import add_generation_options, add_model_options, add_slots, load_model
from modelscope_dolly.cli.streams import complain
from modelscope_dolly.errors import SettingError, printable, unknown_name

if TYPE_CHECKING:
    from modelscope_dolly.batch.answer_file import BatchOutcome
    from modelscope_dolly.batch.input_rows import InputRows
    from modelscope_dolly.batch.output_paths import OutputPaths
    from modelscope_dolly.locks import FileLock

SUMMARY = "answer many instructions from a file; the same command goes on after a stop"
ORDERS = ("finished", "input")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", help="JSON lines as in databricks-dolly-15k, or one instruction a line; - is standard input"
    )
    parser.add_argument("output", metavar="OUTPUT.jsonl", help="answers, appended as they are finished")
    parser.add_argument("--format", help="of the input: jsonl or lines (default: by its name, else its first line)")
    parser.add_argument("--order", default="finished", help="finished, or input: sorted at the end (default: finished)")
    parser.add_argument("--overwrite", action="store_true", help="replace answers of other settings or another input")
    add_model_options(parser)
    add_slots(parser, "32")
    add_generation_options(parser)


def run(options: argparse.Namespace) -> int:
    if options.order not in ORDERS:
        raise SettingError(unknown_name("order", options.order, ORDERS))
    from modelscope_dolly.batch.input_rows import InputRows
    from modelscope_dolly.batch.output_paths import output_paths
    from modelscope_dolly.locks import acquire

    paths = output_paths(options.output)
    with interrupt_once() as received:
        lock, lines = acquire(paths.lock, paths.answers, "give another name")
        try:
            for line in lines:
                complain(line)
            with InputRows(options.input, options.format, paths.answers.parent) as rows:
                if any(rows.same_file(path) for path in paths):
                    raise SettingError(f"{options.output}: would be written over the input; give another name")
                return _report(options, paths, rows, _answer(options, paths, rows, lock))
        except KeyboardInterrupt:
            return 128 + received[0]
        finally:
            lock.release()


def _answer(options: argparse.Namespace, paths: OutputPaths, rows: InputRows, lock: FileLock) -> BatchOutcome:
    dolly, settings = load_model(options)
    from modelscope_dolly.batch.answer_file import answer_file
    from modelscope_dolly.kernels.quantized_linear import parse_quantize

    return answer_file(
        rows, paths, dolly, settings, quantize=parse_quantize(options.quantize), draft=options.draft,
        overwrite=options.overwrite, in_order=options.order == "input", check=lock.check, say=complain,
    )  # fmt: skip


def _report(options: argparse.Namespace, paths: OutputPaths, rows: InputRows, outcome: BatchOutcome) -> int:
    """Print what has been done; 1 where rows could not be answered."""
    if rows.unknown_keys:
        keys = ", ".join(f"{key} (line {line})" for key, line in list(rows.unknown_keys.items())[:5])
        complain(f"{rows.name}: keys that mean nothing here were passed over: {keys}")
    problems = str(paths.problems) if outcome.bad else None
    if options.json:
        facts = {"output": str(paths.answers), "errors": problems, **dataclasses.asdict(outcome)}
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(f"{printable(str(paths.answers))}: {outcome.answered:,} of {outcome.rows:,} rows answered", end="")
        if outcome.new_rows:
            speed = outcome.new_tokens / max(outcome.seconds, 1e-9)
            print(f", {outcome.new_rows:,} rows and {outcome.new_tokens:,} tokens in {outcome.seconds:,.1f} s", end="")
            print(f" ({speed:,.1f} tokens/s)", end="")
        print(f"; {outcome.bad:,} cannot be: {printable(problems)}" if problems else "")
    return 1 if outcome.bad else 0
