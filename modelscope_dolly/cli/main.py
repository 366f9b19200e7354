"""The `dolly` command, also reachable as `modelscope dolly ...`: its parser, its exit codes.

A mistake that the user can fix is one line and exit code 2, Ctrl-C is 130; `dolly check` and `dolly batch` end with 0
or 1. The modules of the commands import nothing heavy before they run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any, NoReturn

from modelscope_dolly import __version__
from modelscope_dolly.cli import (
    ask,
    batch,
    bench,
    chat,
    check,
    compare,
    eval,
    export,
    plan,
    quantize,
    score,
    serve,
    web,
)
from modelscope_dolly.cli.exit_codes import exit_code
from modelscope_dolly.cli.parser import UsageParser
from modelscope_dolly.errors import SettingError

COMMANDS = {
    "ask": ask, "chat": chat, "batch": batch, "serve": serve, "web": web, "plan": plan, "check": check,
    "quantize": quantize, "export": export, "bench": bench, "eval": eval, "score": score, "compare": compare,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = UsageParser(prog="dolly", description="dolly-v2, an instruction-following model.")
    parser.add_argument("--version", action="version", version=f"modelscope-dolly {__version__}")
    add_commands(parser, UsageParser)

    def command() -> int:
        if any("\0" in argument for argument in arguments or ()):
            raise SettingError("an argument holds a NUL character")
        return _run(parser.parse_args(arguments))

    return exit_code(command)


def add_commands(parser: argparse.ArgumentParser, parser_class: type[UsageParser]) -> None:
    """Add a subparser of `parser_class` for every command."""
    subparsers = parser.add_subparsers(
        dest="dolly_command", metavar="COMMAND", required=True, parser_class=parser_class
    )
    for name, module in COMMANDS.items():
        command = subparsers.add_parser(name, help=module.SUMMARY, description=module.SUMMARY.capitalize() + ".")
        command.add_argument("--verbose", action="store_true", help="show ModelScope's and our own log lines")
        module.add_arguments(command)
        command.set_defaults(dolly_run=module.run)


def _run(options: argparse.Namespace) -> int:
    if not options.verbose:
        logging.getLogger("modelscope.dolly").setLevel(logging.WARNING)
    return options.dolly_run(options)


class ModelScopeCommand:
    """`modelscope dolly ...`: how ModelScope's own command finds us (entry point group modelscope_hub.cli_plugins).

    Loading this entry point also imports the package in every `modelscope` process, `modelscope server` included, which
    is what registers the pipeline there.
    """

    name = "dolly"

    def __init__(self, options: argparse.Namespace):
        self.options = options

    @classmethod
    def register(cls, subparsers: Any) -> None:
        parser = subparsers.add_parser(cls.name, help="dolly-v2: ask, chat, plan, check")
        add_commands(parser, _ExitingParser)
        parser.set_defaults(_command=cls)

    def execute(self) -> None:
        sys.exit(exit_code(lambda: _run(self.options)))


class _ExitingParser(UsageParser):
    """Ends the process on a usage error: ModelScope's command catches nothing while it parses."""

    def error(self, message: str) -> NoReturn:
        try:
            super().error(message)
        except SettingError as error:
            self.exit(2, f"dolly: {error}\n")
