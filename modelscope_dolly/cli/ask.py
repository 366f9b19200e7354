"""`dolly ask`: answer one instruction."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
from typing import TYPE_CHECKING

from modelscope_dolly.cli.options import add_generation_options, add_model_options, load_model
from modelscope_dolly.cli.streams import read_text
from modelscope_dolly.errors import SettingError

if TYPE_CHECKING:
    from modelscope_dolly.generation import GenerationSettings
    from modelscope_dolly.load import Dolly

SUMMARY = "answer one instruction; the answer is streamed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("instruction", help="the instruction; - reads it from standard input")
    parser.add_argument(
        "--context", metavar="FILE", help="file with text the instruction is about; - is standard input"
    )
    add_model_options(parser)
    add_generation_options(parser)


def run(options: argparse.Namespace) -> int:
    if options.instruction == "-" and options.context == "-":
        raise SettingError("only one of the instruction and --context can come from standard input (-)")
    record = {"instruction": read_text("-") if options.instruction == "-" else options.instruction}
    if options.context is not None:
        record["context"] = read_text(options.context)
    from modelscope_dolly.generation import parse_input

    parse_input(record)  # before the minute a large model takes to load
    dolly, settings = load_model(options)
    print_answer(dolly, record, settings, options.json)
    return 0


def print_answer(dolly: Dolly, record: dict | str, settings: GenerationSettings, as_json: bool) -> None:
    """Print the answer to one input, streamed or as JSON."""
    from modelscope_dolly.generation import parse_input
    from modelscope_dolly.hardware import dtype_name

    if settings.seed is None:
        settings = dataclasses.replace(settings, seed=secrets.randbelow(2**31))
    shown, update = "", None
    for update in dolly.text_generator.stream([parse_input(record)], settings, slots=1):
        if not as_json:
            print(update.text[len(shown) :], end="", flush=True)
            shown = update.text
    facts = {name: getattr(update, name) for name in ("text", "finish_reason", "prompt_tokens", "new_tokens")}
    facts |= {
        "seed": settings.seed if settings.do_sample else None,
        "model": str(dolly.checkpoint.path),
        "device": str(dolly.device),
        "dtype": dtype_name(dolly.dtype),
        **dolly.text_generator.details(update),
    }
    print(json.dumps(facts, ensure_ascii=False) if as_json else "", flush=True)
