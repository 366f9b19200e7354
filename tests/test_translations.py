"""Every page exists in Chinese, too, with the same headings, code, tables, lists, links, names and numbers.

What a sentence says cannot be compared here. That a page was changed in one language alone mostly shows: a failure
names both pages with their lines.
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.page import Block, Link, Page, is_chinese, numbers, up_to_the_description
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
    found = "\n".join(other_words(Page(page), Page(chinese(page))))
    assert not found, found


def other_words(ours: Page, theirs: Page):
    """One line for each section that lacks a number or a name of the English one, or has a name too many."""
    if len(ours.sections) != len(theirs.sections):
        return  # which belongs to which? differences() has named the headings
    for here, there in zip(ours.sections, theirs.sections, strict=True):
        lost = here.spans - there.spans | numbers(here.text) - numbers(there.text, counted=True)
        for words, text in ((lost, "lacks"), (there.spans - here.spans, "has, and the English page has not:")):
            if words:
                yield f"{where(theirs, there.line)} ({here.title!r}) {text} {', '.join(sorted(words))}"


@pytest.mark.parametrize("page", TRANSLATED, **by_name)
def test_links_lead_to_the_same_places_and_the_pages_to_each_other(page):
    ours, theirs = Page(page), Page(chinese(page))
    first = [(page.path.parent / page.links[0].target).resolve() for page in (ours, theirs)]
    assert first == [chinese(page), page], "the first link of a page leads to the other language"
    places = [[place(one, link) for link in one.links[1:]] for one in (ours, theirs)]
    found = []
    for section in range(len(ours.sections)) if len(ours.sections) == len(theirs.sections) else ():
        here, there = (
            sorted(place for place, link in zip(of, one.links[1:], strict=True) if number(one, link) == section)
            for of, one in zip(places, (ours, theirs), strict=True)
        )
        if here != there:
            title = theirs.sections[section].title if section < len(theirs.sections) else "?"
            found.append(f"{chinese(page).relative_to(ROOT)} ({title}): links to {there}, the English page to {here}")
    assert not found, "\n".join(found)


def number(page: Page, link: Link) -> int:
    """Which section the link stands in; section 0 is what precedes the first heading."""
    return max(n for n, section in enumerate(page.sections) if n == 0 or section.line <= link.line)


def place(page: Page, link: Link) -> tuple[str, int]:
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


WORDS = {  # the field has one word for each; these are others for the same
    "投机解码": "推测解码",
    "键/值缓存": "键值缓存",
    "KV 缓存": "键值缓存",
    "提示语": "提示词",
    "标记器": "分词器",
    "令牌化": "分词",
    "检查站": "检查点",
    "精调": "微调",
    "连续批次": "连续批处理",
    "卸除": "卸载",
    "模型卡": "模型卡片",
}
GAP = re.compile(
    r"[\u4e00-\u9fff，、：] +[\u4e00-\u9fff（“]"
)  # a line that ends inside a sentence is shown with a space
HALF_WIDTH = re.compile(r"[\u4e00-\u9fff][,;:?!]|[\u4e00-\u9fff]\(|\)[\u4e00-\u9fff]")


@pytest.mark.parametrize("page", TRANSLATED, **by_name)
def test_chinese_is_set_as_chinese_in_the_words_of_the_field(page):
    """Punctuation of full width, no gaps between characters, no section left in English, one word for one thing."""
    found = "\n".join(mistakes(Page(chinese(page))))
    assert not found, found


def mistakes(page: Page):
    for section in page.sections:
        for half_width in HALF_WIDTH.findall(section.text):
            yield f"{where(page, section.line)}: {half_width!r} of half width"
        for gap in GAP.findall(section.text):
            yield f"{where(page, section.line)}: {gap!r} with a space or the end of a line in between"
        for word, better in WORDS.items():
            if word in section.text.replace(better, ""):
                yield f"{where(page, section.line)}: {word}, elsewhere {better}"
        if len(section.text) > 80 and not is_chinese(section.text):
            yield f"{where(page, section.line)}: not translated"


# The comparison itself, broken on purpose

ENGLISH = """# Pages

Here are 40 answers of `ask`, 2.5 million tokens.

## Code

```sh
dolly ask    # asks
```

| name | 1 | 2 |
|---|---|---|
| `a` | 3 | b |

- one
- two
"""
SAME = ENGLISH.replace("Here are 40 answers of `ask`, 2.5 million tokens.", "`ask` 的 40 个回答，250 万 token。")
SAME = SAME.replace("# asks", "# 提问").replace("## Code", "## 代码").replace("name", "名称").replace("one", "其一")


def pages(folder: Path, chinese_text: str) -> tuple[Page, Page]:
    (folder / "en.md").write_text(ENGLISH, encoding="utf-8")
    (folder / "zh.md").write_text(chinese_text, encoding="utf-8")
    return Page(folder / "en.md"), Page(folder / "zh.md")


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [
        ("## 代码", "### 代码", ["en.md:5: ## Code", "zh.md:5: ### 代码"]),
        ("dolly ask", "dolly chat", ["en.md:7: code 'dolly ask' under 'Code'", "zh.md:7: code 'dolly chat'"]),
        ("| `a` | 3 |", "| `a` | 4 |", ["en.md:11: table", "zh.md:11: table"]),
        ("| 2 |\n", "|\n", ["table"]),
        ("- two\n", "", ["list '2'", "list '1'"]),
        ("## 代码\n", "## 代码\n\n### 另一节\n", ["en.md:7: nothing here", "zh.md:7: ### 另一节"]),
        ("40 个", "41 个", ["zh.md:1 ('Pages') lacks 40"]),
        ("`ask` 的", "`chat` 的", ["lacks ask", "has, and the English page has not: chat"]),
        ("回答，", "回答,", ["'答,' of half width"]),
        ("个回答", "个\n回答", ["'个 回' with a space or the end of a line"]),
        ("回答", "提示语", ["提示语, elsewhere 提示词"]),
    ],
)
def test_a_difference_is_found_and_named(tmp_path, monkeypatch, there, instead, said):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert SAME.count(there) == 1
    for text, expected in ((SAME, []), (SAME.replace(there, instead), said)):
        both = pages(tmp_path, text)
        found = "\n".join([*differences(*both), *other_words(*both), *mistakes(both[1])])
        assert bool(found) == bool(expected), found
        assert all(part in found for part in expected), found
