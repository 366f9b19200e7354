"""`dolly compare`: two models answer the same instructions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from modelscope_dolly.cli.options import add_json
from modelscope_dolly.errors import SettingError
from modelscope_dolly.files import file_kind, path_of

SUMMARY = "two models answer the same instructions: held-out loss, and a page to read and mark"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("first", metavar="A", help="directory or hub id, OWNER/NAME[@REVISION]")
    add("second", metavar="B", help="the other one")
    add("--data", required=True, metavar="FILE", help=".jsonl with instruction, response, and perhaps context")
    add("--records", type=int, metavar="N", help="the first N records (default: all)")
    add("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    add("--minutes", type=float, help="stop after so much time, and compare what both have answered")
    add("--output", default="runs/compare", metavar="DIR", help="table, JSON and page (default: runs/compare)")
    add("--names", nargs=2, metavar=("A", "B"), help="what to call them (default: last parts of their names)")
    add("--blind", action="store_true", help="the page opens with the names hidden")
    add("--device", help="cpu, cuda:N or gpu (default: first GPU, else CPU)")
    add("--dtype", help="bf16, fp16 or fp32 (default: what suits the device)")
    add("--quantize", help="none, int8 or int4 (default: none)")
    add("--threads", type=int, help="of the CPU (default: physical cores)")
    add_json(parser, " besides writing the files")


def run(options: argparse.Namespace) -> int:
    for name, least in (("records", 1), ("max_new_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise SettingError(f"--{name.replace('_', '-')} is {value}, it must be at least {least}")
    if options.minutes is not None and not 0 < options.minutes < 1e6:
        raise SettingError(f"--minutes is {options.minutes}, it must be above 0, and below a million")
    output = Path(path_of("--output", options.output))
    if file_kind(output) not in (None, "directory"):
        raise SettingError(f"{output}: is a file; --output takes a directory")
    from modelscope_dolly.compare import compare_report
    from modelscope_dolly.compare.held_out import read_held_out
    from modelscope_dolly.compare.side_by_side import ComparedModel, compare

    records = read_held_out(Path(path_of("--data", options.data)), options.records)
    models = [_split_revision(model) for model in (options.first, options.second)]
    names = options.names or _names([model for model, _ in models])
    first, second = (ComparedModel(*model, name) for model, name in zip(models, names, strict=True))
    chosen = {name: getattr(options, name) for name in ("device", "dtype", "quantize", "threads")}
    comparison = compare(first, second, records, options.max_new_tokens, options.minutes, _progress, **chosen)
    files = compare_report.write(comparison, output, options.blind)
    if options.json:
        print(json.dumps(compare_report.as_json(comparison), ensure_ascii=False))
    else:
        print(compare_report.text(comparison))
        print(f"written: {', '.join(map(str, files))}")
    return 0


def _split_revision(model: str) -> tuple[str, str | None]:
    """`owner/name@v1` -> name and revision; a directory may have any character."""
    name, separator, revision = model.rpartition("@")
    if separator and name and revision and file_kind(path_of("model", model)) is None:
        return name, revision
    return model, None


def _names(models: list[str]) -> list[str]:
    """Their last parts; more of them, and a number at last, where these are the same."""
    for parts in (1, 2, 3):
        names = ["/".join(model.rstrip("/").split("/")[-parts:]) for model in models]
        if names[0] != names[1]:
            return names
    return [f"{number} {model}" for number, model in zip("AB", models, strict=True)]


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
