"""The YAML of a recipe, with text, numbers, true and false, null, lists and maps, and nothing else.

PyYAML parses it; what the values mean is decided here, because its own schema (YAML 1.1) turns a version into a date,
`0123` into 83 and `1:30` into 90, runs into errors of its own for others, and follows aliases and tags. This schema is
that of JSON: a plain value is a number where JSON has that number, and true, false and null are themselves. Everything
else is text as it stands. Numbers in another spelling are for the settings to accept (config.py: `.5`, `5.`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from modelscope_dolly.errors import SettingError, one_line

#: A recipe has some forty short lines. What is larger is another file, and PyYAML would take minutes for it.
MOST_BYTES = 1 << 17
MOST_DEPTH = 20
MOST_DIGITS = 40
_NAMED = {"true": True, "false": False, "null": None, "~": None, "": None}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<fraction>\.[0-9]+)?(?P<exponent>[eE][-+]?[0-9]+)?")
#: Control characters, and halves of surrogate pairs: in no name of a file or a hub, and not every file can hold them.
_BAD_CHARACTER = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class _Refused(ValueError):
    """Something in the text that a recipe cannot have; says where."""


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises SettingError with the line of a mistake."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise SettingError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MOST_BYTES:
        raise SettingError(f"{path}: not a recipe: larger than {MOST_BYTES:,} bytes; is it the dataset?")
    try:
        values = parse(data.decode("utf-8-sig"))
    except ValueError as error:
        raise SettingError(f"{path}: not YAML of a recipe: {one_line(error)}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else kind(values)
        raise SettingError(f"{path}: must hold `key: value` lines, found {found}")
    return values


def parse(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: not YAML, or YAML that a recipe cannot have; names the line.
    """
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # a state machine: no depth exhausts the stack
            builder.add(event)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None
    return builder.value


def kind(value: Any) -> str:
    """What a value is, for people."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "a map"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any, length: int = 80) -> str:
    """A value for a message: on one line, and short."""
    try:
        return one_line(ValueError(repr(value)), length)
    except (ValueError, RecursionError):  # a number of more digits than Python prints; a list in itself
        return f"{kind(value)} too large to be shown"


def problem(value: Any, depth: int = 0) -> str | None:
    """What makes a value, from a file or from a program, impossible in a recipe; None where nothing does."""
    if depth > MOST_DEPTH:
        return f"it must be at most {MOST_DEPTH} levels deep"
    if isinstance(value, str):
        found = _BAD_CHARACTER.search(value)
        return f"it must be text without control characters, found {found[0]!r}" if found else None
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        too_large = abs(value) >= 10**MOST_DIGITS if isinstance(value, int) else not math.isfinite(value)
        return f"it must be a number of at most {MOST_DIGITS} digits" if too_large else None
    if isinstance(value, (list, tuple, dict)):
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            return "its keys must be text"
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((found for part in parts if (found := problem(part, depth + 1))), None)
    return f"it must be text, a number, true, false, a list or a map, not {type(value).__name__}"


class _Builder:
    """Values from the events of yaml.parse."""

    def __init__(self):
        self.value: Any = None
        self._open: list[Any] = []  # lists and maps that have not ended, outermost first
        self._keys: list[str | None] = []  # for each of these, the key that waits for its value
        self._documents = 0

    def add(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:  # an alias has one, too
            raise _Refused(f"line {line}: anchors and aliases (&{event.anchor}) are not read; repeat the value")
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"line {line}: tags ({shown(event.tag)}) are not read; write the value alone")
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _Refused(f"line {line}: a second document begins; a recipe is one")
        elif isinstance(event, yaml.ScalarEvent):
            self._put(self._key(event, line) if self._wants_key() else _scalar(event, line), line)
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            if self._wants_key():
                raise _Refused(f"line {line}: a key must be a word, not a list or a map")
            if len(self._open) == MOST_DEPTH:
                raise _Refused(f"line {line}: more than {MOST_DEPTH} lists and maps inside each other")
            value: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            self._put(value, line)
            self._open.append(value)
            self._keys.append(None)
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            self._open.pop()
            self._keys.pop()

    def _wants_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1], dict) and self._keys[-1] is None

    def _key(self, event: yaml.ScalarEvent, line: int) -> str:
        if event.value in self._open[-1]:
            raise _Refused(f"line {line}: the key {shown(event.value)} is there twice")
        return event.value

    def _put(self, value: Any, line: int) -> None:
        if found := problem(value):
            raise _Refused(f"line {line}: {shown(value)}: {found}")
        if not self._open:
            self.value = value
        elif isinstance(self._open[-1], list):
            self._open[-1].append(value)
        elif self._keys[-1] is None:
            self._keys[-1] = value
        else:
            self._open[-1][self._keys[-1]] = value
            self._keys[-1] = None


def _scalar(event: yaml.ScalarEvent, line: int) -> Any:
    """The value of one word or quoted text."""
    if event.style is not None:  # quoted, or a block of text
        return event.value
    if event.value in _NAMED:
        return _NAMED[event.value]
    number = _NUMBER.fullmatch(event.value)
    if number is None:
        return event.value
    if len(event.value) > MOST_DIGITS:
        raise _Refused(f"line {line}: a number of {len(event.value)} characters; {MOST_DIGITS} are the most")
    return float(event.value) if number["fraction"] or number["exponent"] else int(event.value)
