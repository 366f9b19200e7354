"""Whatever goes wrong outside this code is a DollyError: one clear line for the user, exit code 2 in the commands.

ModelScope re-raises an exception of a plugin as `type(e)(f"{class}: {e}")`, so each class here must be constructible
from one string.
"""

from __future__ import annotations

import difflib
import numbers
import unicodedata
from collections.abc import Iterable


class DollyError(Exception):
    """Base of all errors that a user can cause or fix. Its message is one line, whatever names and values it quotes."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


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


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> str:
    """Message for a name that does not exist: the name, the most similar allowed one, and all that are allowed."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name[:100], allowed, n=1, cutoff=0.6) if isinstance(name, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {shown(name)}.{hint} Allowed: {', '.join(allowed)}"


def shown(value: object, length: int = 200) -> str:
    """`repr` of what a user gave, on one line of at most `length` characters; the type of what has no `repr`."""
    try:
        return one_line(repr(value), length)
    except Exception:  # whatever a strange object raises; also a number of more than 4,300 digits
        return f"<{type(value).__name__}>"


def printable(text: str) -> str:
    """Text for one line of a terminal: line ends, and characters that control the terminal, as escapes."""
    if text.isprintable():
        return text
    kept = (c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text)
    return "".join(kept)


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value is a whole number, of Python or of NumPy, from `low` to `high`. True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


def one_line(error: BaseException | str, length: int = 300) -> str:
    """A message of another library on one line of at most `length` characters, to be quoted in ours."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
