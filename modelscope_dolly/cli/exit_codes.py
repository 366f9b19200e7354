"""What goes wrong in a command becomes one line and an exit code: of `dolly`, and of the commands of the recipe.

A mistake that the user can fix is 2, Ctrl-C 130, a reader that is gone 141.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from modelscope_dolly.cli import streams
from modelscope_dolly.errors import DollyError

#: The command whose errors are told, unless another is named.
DOLLY = "dolly"


def exit_code(command: Callable[[], int], program: str = DOLLY) -> int:
    """Run a command with streams that may be closed or full, and turn what goes wrong into an exit code.

    Args:
        command: returns its own exit code.
        program: how its errors begin.
    """

    def prepared() -> int:
        streams.prepare()
        return command()

    try:
        code = _caught(prepared, program)
    except SystemExit:  # of --help and --version, which have printed
        if flushed := _caught(streams.flush, program):
            raise SystemExit(flushed) from None
        raise
    flushed = _caught(streams.flush, program)
    return code or flushed


def _caught(step: Callable[[], int], program: str) -> int:
    try:
        return step()
    except DollyError as error:
        streams.complain(str(error), program)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader is gone (`dolly ask ... | head`)
        streams.give_up(sys.stdout)
        return 141
    except MemoryError:
        plan = "dolly plan" if program == DOLLY else "python -m train.plan"
        streams.complain(f"not enough memory; see: {plan}", program)
        return 2
    except OSError as error:  # of a file or stream that no command expected to fail: a full disk, for instance
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):  # of a library: a mistake of ours
            raise
        streams.complain(streams.describe(error), program)
        return 2
