"""The command-line parser of all commands: a usage error is one line and exit code 2, like every other mistake."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from modelscope_dolly.errors import SettingError, one_line, unknown_name


class UsageParser(argparse.ArgumentParser):
    """An ArgumentParser that raises SettingError for a usage error, and names the most similar options.

    The commands of train/ pass allow_abbrev=False: a short form could mean a flag of torchrun.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, except that an unknown argument is an error of the subcommand it was given to."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            similar = difflib.get_close_matches(unknown[0], known, n=5, cutoff=0.0)
            self.error(unknown_name("argument", unknown[0], similar))
        return options, unknown

    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{one_line(message)}; see {self.prog} --help")
