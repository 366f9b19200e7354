"""The standard streams of a process, which may be closed, full, endless, or hold bytes that are no text."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from modelscope_dolly.errors import SettingError, printable

#: Bytes of the longest text that is read. A window of 2,048 tokens holds about 10,000 characters.
LARGEST_TEXT = 1 << 24


def prepare() -> None:
    """Before a command runs. Raises SettingError where there is no standard output to print to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its place, and be printed into
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise SettingError("standard output is closed; to discard what is printed: > /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold characters that this terminal cannot show; the name of a file, bytes that are no text.
        utf8 = sys.stdout.encoding.lower() == "utf-8"
        sys.stdout.reconfigure(errors="backslashreplace" if utf8 else "replace")


def complain(message: str, program: str = "dolly") -> None:
    """One line on standard error, if it takes it."""
    try:
        print(f"{program}: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def flush() -> int:
    """Write out what has been printed. Raises OSError where standard output does not take it; returns 0."""
    try:
        sys.stderr.flush()
    except OSError:
        give_up(sys.stderr)
    sys.stdout.flush()
    return 0


def describe(error: OSError) -> str:
    """What failed, and why. Only printing names no file."""
    reason = error.strerror or str(error)
    if isinstance(error.filename, (str, bytes)):
        return f"{os.fsdecode(error.filename)}: {reason}"
    give_up(sys.stdout)
    return f"standard output: {reason}"


def give_up(stream: TextIO) -> None:
    """Print nothing more: Python would complain when it closes the stream."""
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
    except io.UnsupportedOperation:  # no stream of the system's
        pass


def read_text(name: str) -> str:
    """Text of a file or of standard input (-), without the newline at its end. Raises SettingError."""
    if name == "-":
        return _decoded("standard input", _read(_input(), LARGEST_TEXT)).rstrip("\n")
    try:
        with open(name, "rb") as file:
            content = _read(file, LARGEST_TEXT, name)
    except (OSError, ValueError) as error:
        raise SettingError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _decoded(name, content.replace(b"\r\n", b"\n")).rstrip("\n")


def read_lines() -> Iterator[str]:
    """The lines of standard input, one by one. Raises SettingError for one that is no text."""
    number = 0
    while line := _read_line(number := number + 1):
        yield line


def _read_line(number: int) -> str:
    source = f"standard input: line {number}"
    try:
        line = _input().readline(LARGEST_TEXT + 1)
    except OSError as error:
        raise SettingError(f"standard input: cannot be read: {error.strerror}") from None
    if len(line) > LARGEST_TEXT:
        raise SettingError(f"{source}: longer than {LARGEST_TEXT:,} bytes")
    return _decoded(source, line)


def _input() -> BinaryIO:
    if sys.stdin is None:
        raise SettingError("standard input is closed")
    return sys.stdin.buffer


def _read(file: BinaryIO, largest: int, name: str = "standard input") -> bytes:
    try:
        content = file.read(largest + 1)
    except OSError as error:
        raise SettingError(f"{name}: cannot be read: {error.strerror}") from None
    if len(content) > largest:
        raise SettingError(f"{name}: longer than {largest:,} bytes")
    return content


def _decoded(source: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise SettingError(f"{source}: not UTF-8 (byte {byte:#04x} at {error.start})") from None
