"""The examples of docs/serving.md against a server."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- not run: needs the server above; \S+ runs it -->\n```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_there_are_examples():
    assert [language for language, _ in EXAMPLES] == ["sh", "python"]


@pytest.mark.parametrize(("language", "code"), EXAMPLES, ids=[language for language, _ in EXAMPLES])
def test_an_example_of_the_page_runs(server, language, code):
    code = code.replace("http://127.0.0.1:8000", server.url).replace("curl -s", "curl -fs")
    command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    if language == "sh":
        assert '"finish_reason":"' in done.stdout and "data: [DONE]" in done.stdout and '{"text":"' in done.stdout
