"""Every page exists in Chinese, too, with the same headings, code, tables, lists, links, names and numbers.

What a sentence says cannot be compared here. That a page was changed in one language alone mostly shows: a failure
names both pages with their lines.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.page import Block, Page, is_chinese, numbers, up_to_the_description
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
ENGLISH_ALONE = {DOCS / "decisions.md"}  # a log for those who change the code

PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.glob("*.md") if page not in ENGLISH_ALONE)]


def chinese(page: Path) -> Path:
    return ROOT / "README_zh.md" if page == ROOT / "README.md" else DOCS / "zh" / page.name


TRANSLATED = [page for page in PAGES if chinese(page).is_file()]  # what lacks a translation fails once, by name
by_name = {"ids": lambda page: page.name}


def where(page: Page, line: int) -> str:
    return f"{page.path.relative_to(ROOT)}:{line}"


def test_every_page_for_users_has_a_chinese_one_and_no_chinese_page_is_left_over():
    expected = {chinese(page) for page in PAGES}
    missing = sorted(str(page.relative_to(ROOT)) for page in expected if not page.is_file())
    assert not missing, f"not translated yet: {', '.join(missing)}"
    assert set((DOCS / "zh").glob("*.md")) <= expected
    assert len(expected) >= 10


@pytest.mark.parametrize("page", TRANSLATED, **by_name)
def test_headings_code_tables_and_lists_are_the_same(page):
    ours, theirs = Page(page), Page(chinese(page))
    assert not (found := "\n".join(differences(ours, theirs))), f"the pages differ:\n{found}"
    assert len(ours.blocks) >= 5


def differences(ours: Page, theirs: Page):
    """One line for each run of blocks that one page has and the other has not, or has differently."""
    translated = {
        up_to_the_description(line)
        for block in theirs.blocks
        if block.kind == "code"
        for line in block.shape[1]
        if is_chinese(line)
    }
    keys = [[(block.kind, comparable(block, translated)) for block in page.blocks] for page in (ours, theirs)]
    for tag, i, j, k, m in difflib.SequenceMatcher(a=keys[0], b=keys[1], autojunk=False).get_opcodes():
        if tag != "equal":
            yield f"{described(ours, i, j)}\n    but {described(theirs, k, m)}"


def comparable(block: Block, translated: set[str]) -> object:
    """The shape; of `text`, lines whose description is translated (a tree of folders) only up to that description."""
    if block.kind != "code":
        return block.shape
    language, lines = block.shape
    begins = [up_to_the_description(line) for line in lines]
    return language, tuple(begin if begin in translated else line for begin, line in zip(begins, lines, strict=True))


def described(page: Page, begin: int, end: int) -> str:
    if begin == end:
        line = page.blocks[begin].line if begin < len(page.blocks) else "end"
        return f"{page.path.relative_to(ROOT)}:{line}: nothing here"
    return "; ".join(
        f"{where(page, block.line)}: {block}" + ("" if block.kind == "heading" else f" under {block.section!r}")
        for block in page.blocks[begin:end]
    )


@pytest.mark.parametrize("page", TRANSLATED, **by_name)
def test_names_in_code_type_and_numbers_are_the_same_in_each_section(page):
    ours, theirs = Page(page), Page(chinese(page))
    found = []
    for here, there in zip(ours.sections, theirs.sections, strict=False):
        lost = here.spans - there.spans | numbers(here.text) - numbers(there.text, counted=True)
        added = there.spans - here.spans
        for words, text in ((lost, "lacks"), (added, "has, and the English page has not:")):
            if words:
                found.append(f"{where(theirs, there.line)} ({here.title!r}) {text} {', '.join(sorted(words))}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", TRANSLATED, **by_name)
def test_links_lead_to_the_same_places_and_the_pages_to_each_other(page):
    ours, theirs = Page(page), Page(chinese(page))
    first = [(page.path.parent / page.links[0].target).resolve() for page in (ours, theirs)]
    assert first == [chinese(page), page], "the first link of a page leads to the other language"
    places = [[place(one, link) for link in one.links[1:]] for one in (ours, theirs)]
    found = []
    for section in sections_in_order(ours):
        here, there = (
            sorted(place for place, link in zip(of, one.links[1:], strict=True) if number(one, link) == section)
            for of, one in zip(places, (ours, theirs), strict=True)
        )
        if here != there:
            title = theirs.sections[section].title if section < len(theirs.sections) else "?"
            found.append(f"{chinese(page).relative_to(ROOT)} ({title}): links to {there}, the English page to {here}")
    assert not found, "\n".join(found)


def sections_in_order(page: Page) -> range:
    return range(len(page.sections))


def number(page: Page, link) -> int:
    """Which section the link stands in; section 0 is what precedes the first heading."""
    return max(n for n, section in enumerate(page.sections) if n == 0 or section.line <= link.line)


def place(page: Page, link) -> tuple[str, int]:
    """The English page (or file) that the link means, and which heading of it; -1 for the whole page."""
    if re.match(r"https?:", link.target):
        return link.target, -1
    target = (page.path.parent / link.target).resolve() if link.target else page.path
    assert target.exists(), f"{where(page, link.line)}: {link.target} does not exist"
    heading = -1
    if link.anchor:
        anchors = Page(target).anchors
        assert unquote(link.anchor) in anchors, f"{where(page, link.line)}: no heading #{link.anchor} in {target.name}"
        heading = anchors.index(unquote(link.anchor))
    for english in PAGES:
        if target == chinese(english):
            target = english
    return str(target.relative_to(ROOT)), heading


HALF_WIDTH = re.compile(r"[\u4e00-\u9fff][,;:?!](?=[\s\u4e00-\u9fff]|$)|[\u4e00-\u9fff]\(|\)[\u4e00-\u9fff]")


@pytest.mark.parametrize("page", TRANSLATED, **by_name)
def test_chinese_is_set_as_chinese(page):
    """Punctuation marks of full width after Chinese characters, and no line left in English by mistake."""
    found = []
    for section in Page(chinese(page)).sections:
        half_width = re.findall(
            r"[\u4e00-\u9fff][,;:?!](?=[\s\u4e00-\u9fff]|$)|[\u4e00-\u9fff]\(|\)[\u4e00-\u9fff]", section.text
        )
        if half_width:
            found.append(f"{chinese(page).relative_to(ROOT)}:{section.line}: {half_width}, of half width")
        if len(section.text) > 80 and not is_chinese(section.text):
            found.append(f"{chinese(page).relative_to(ROOT)}:{section.line}: not translated")
    assert not found, "\n".join(found)
