"""Signals of child processes."""

from __future__ import annotations

import signal


def interruptible() -> None:
    """`preexec_fn` of a child that is to be stopped by Ctrl-C.

    A script's background jobs ignore SIGINT, and so do their children, unless they are told otherwise; Python then
    raises no KeyboardInterrupt.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
