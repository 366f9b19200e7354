"""Whatever goes wrong outside this code is a DollyError: one clear line for the user, exit code 2 in the commands.

ModelScope re-raises an exception of a plugin as `type(e)(f"{class}: {e}")`, so each class here must be constructible
from one string.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DollyError(Exception):
    """Base of all errors that a user can cause or fix."""


class CheckpointError(DollyError):
    """A model directory is missing, incomplete, damaged or not a dolly-v2 checkpoint."""


class PromptError(DollyError):
    """An instruction or context cannot be turned into a prompt, or does not fit the window."""


class SettingError(DollyError):
    """A keyword, flag or configuration value is unknown or out of range."""


class HardwareError(DollyError):
    """The requested device, number type or amount of memory is not on this machine."""


class PublishError(DollyError):
    """The hub or the network did not let a publish be completed."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Message for a name that does not exist: the name, the most similar allowed one, and all that are allowed."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed)}"


def one_line(error: BaseException, length: int = 300) -> str:
    """The message of another library's error on one line of at most `length` characters, to be quoted in ours."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
