"""README and docs are true: every command and program in them runs, or says why it is not run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [ROOT / "README_zh.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]
PAGES = ENGLISH + CHINESE  # that both have the same code is the business of test_translations.py
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


def blocks(pages: list[Path]) -> list[tuple[str, str, str | None, str]]:
    found = []
    for page in pages:
        for number, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8"))):
            found.append((f"{page.name}-{number}", match["language"], match["reason"], match["code"]))
    return found


def runnable() -> list:
    return [
        pytest.param(language, code, id=name)
        for name, language, reason, code in blocks(ENGLISH)
        if language in ("sh", "python") and reason is None
    ]


@pytest.fixture(scope="module")
def place(checkpoint_dir, tmp_path_factory) -> Path:
    """A directory where runs/nano/final is a checkpoint, as after make demo (with random weights)."""
    here = tmp_path_factory.mktemp("reader")
    shutil.copytree(checkpoint_dir, here / "runs" / "nano" / "final")
    return here


@pytest.mark.parametrize(("language", "code"), runnable())
def test_block_runs(place, language, code):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "print" not in code


def test_blocks_were_found_and_every_language_is_known():
    found = blocks(PAGES)
    assert len(found) > 15 and len(runnable()) >= 10
    assert {language for _, language, _, _ in found} <= {"sh", "python", "text"}


def test_readme_is_short_and_has_a_picture():
    for page in (ROOT / "README.md", ROOT / "README_zh.md"):
        text = page.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 120 and text.count("![") == 1, page.name


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
def test_tree_of_the_architecture_names_every_folder_of_the_code_and_nothing_else(folder):
    page = ROOT / folder / "architecture.md"
    tree = re.search(r"```text\n(modelscope_dolly/.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    named, parents = set(), {0: ROOT}  # indentation -> the folder that lines so far to the right are in
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0]
        indentation = len(line) - len(line.lstrip())
        for name in names.split(", "):
            path = parents[indentation] / name
            assert path.is_dir() if name.endswith("/") else path.is_file(), line
            named.add(path)
        parents[indentation + 4] = path
    code = {path.parent for folder in ("modelscope_dolly", "train") for path in (ROOT / folder).rglob("*.py")}
    assert len(code) > 10 and code <= named


def test_files_that_pages_name_exist():
    count = 0
    for page in PAGES:
        if page.name == "decisions.md":  # it speaks of what was dropped, too
            continue
        for name in re.findall(r"\b(?:modelscope_dolly|train|tests)/[\w./-]+\.\w+\b", page.read_text(encoding="utf-8")):
            count += 1
            assert (ROOT / name).is_file(), f"{page.relative_to(ROOT)}: {name}"
    assert count >= 20


def test_links_between_pages_lead_somewhere():
    count = 0
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            count += 1
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
    assert count >= 8
