"""Files of records for tests."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from train.data.layouts import FIELDS
from train.data.sources import Sources

BOM = b"\xef\xbb\xbf"
GOOD = {"instruction": "What is dew?", "context": "", "response": "Water."}
# csv of Python 3.10 refuses NUL, in one clear line
CSV_TEXT = st.text() if sys.version_info >= (3, 11) else st.text().filter(lambda text: "\0" not in text)
HARD_TEXT = st.text(alphabet="ab\"',;\r\n\t\\\u2028\u0085\ufeff🙂")
examples = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def row_lists(text=CSV_TEXT):
    return st.lists(st.fixed_dictionaries(dict.fromkeys(FIELDS, text | HARD_TEXT)), min_size=1, max_size=6)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def jsonl(rows: list, end: str = "\n", **options) -> bytes:
    return "".join(json.dumps(row, **options) + end for row in rows).encode("utf-8")


def as_csv(rows: list[dict], header=FIELDS, **options) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, header, **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def values(source: Sources) -> list:
    return [row.value for row in source.rows]
