"""Pieces of Markdown for the model card that no text of a user can break: headings, tables, code spans, numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from train.publishing.run_metadata import last_part

Translate = Callable[[str, str], str]  # of an English and a Chinese text, the one in the language being written
Rows = list[tuple[str, str]]  # label, value


def heading(level: int, text: str) -> str:
    return f"{'#' * level} {text}"


def table(tr: Translate, rows: Rows) -> str:
    """The rows that have a value. Cells must be single lines without a bare `|`: see `code`."""
    lines = [f"| {label} | {value} |" for label, value in rows if value]
    return "\n".join([f"| {tr('what', '项目')} | {tr('value', '值')} |", "|---|---|", *lines])


def clean(text: str) -> str:
    """On one line, without what is invisible or has no UTF-8 form."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def code(value: Any) -> str:
    """A user's text as a code span for a table's cell, where nothing in it is Markdown; "" for what is no text."""
    text = clean(value) if isinstance(value, str) else ""
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    # A `|` would end the cell, also in a code span, and readers differ in what a backslash before it does.
    return f"{fence}{space}{text.replace('|', '¦')}{space}{fence}"


def title(model_id: str) -> str:
    """The name for the heading; plain where it can be."""
    name = clean(last_part(model_id))
    return name if re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", name, re.ASCII) else code(name)


def literal(text: str) -> str:
    """A Python string; with double quotes where nothing in the text needs escaping."""
    return f'"{text}"' if re.fullmatch(r"[\w./@-]*", text, re.ASCII) else ascii(text)


def hex_digest(value: Any) -> str:
    """A digest as it is; "" for what is none."""
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,128}", value) else ""


def number(value: Any, digits: int | None = None) -> str:
    """With separators for thousands; "" for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return ""
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def setting(value: Any) -> str:
    return f"`{json.dumps(value)}`" if isinstance(value, (bool, int, float)) else code(value)
