"""The `dolly` command: one file per command, whatever is heavy imported when it runs."""

from modelscope_dolly.cli.main import ModelScopeCommand, main

__all__ = ["ModelScopeCommand", "main"]
