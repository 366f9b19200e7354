"""`dolly chat`: answer one instruction per line, from a terminal or a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from modelscope_dolly.cli.ask import print_answer
from modelscope_dolly.cli.options import add_generation_options, add_model_options, load_model
from modelscope_dolly.cli.streams import complain, read_lines
from modelscope_dolly.errors import DollyError, SettingError

SUMMARY = "answer one instruction after another, each on its own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_generation_options(parser)


def run(options: argparse.Namespace) -> int:
    if sys.stdin is None:
        raise SettingError("standard input is closed: nobody can ask")
    dolly, settings = load_model(options)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (line editing and history for input())

        print(
            "dolly answers instructions and is not a dialogue model: each line is a fresh start, earlier lines are "
            "forgotten.\nCtrl-C stops an answer, Ctrl-D leaves.",
            file=sys.stderr,
        )
    for line in _lines(interactive):
        try:
            print_answer(dolly, line, settings, options.json)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        except DollyError as error:
            if not interactive:
                raise
            complain(str(error))
    return 0


def _lines(interactive: bool) -> Iterator[str]:
    for line in _typed() if interactive else read_lines():
        if line.strip():
            yield line.strip()


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:  # of a terminal with another encoding than this process
            complain(f"not {error.encoding}: type the line again")
