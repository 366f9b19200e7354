"""The `dolly` command: one file per command, each imported when it runs."""

from modelscope_dolly.cli.main import ModelScopeCommand, build_parser, main

__all__ = ["ModelScopeCommand", "build_parser", "main"]
