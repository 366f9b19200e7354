"""A page of the documentation, read as Markdown: its blocks, its links and the anchors of its headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """What has to be the same in every language.

    Attributes:
        kind: "heading", "code", "table", "list" or "not run" (the comment above code that is not run).
        shape: the part of it that is compared: a level; language and lines of code without comments; rows of cells; a
            number of items.
        line: where it begins, counted from 1.
        section: the heading it stands under.
    """

    kind: str
    shape: object
    line: int
    section: str

    def __str__(self) -> str:
        if self.kind == "heading":
            return f"{'#' * self.shape} {self.section}"
        shown = " / ".join(self.shape[1]) if self.kind == "code" else self.shape
        return f"{self.kind} {' '.join(str(shown).split())[:100]!r}"


@dataclass(frozen=True)
class Link:
    """`target` as written, without its anchor ("" for the page itself)."""

    target: str
    anchor: str
    line: int
    section: str


@dataclass(frozen=True)
class Section:
    """The text under one heading, code and links aside."""

    title: str
    line: int
    spans: frozenset[str]  #: what is `set as code`
    text: str


class Page:
    """One Markdown file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        tokens = _MARKDOWN.parse(path.read_text(encoding="utf-8"))
        self.blocks: list[Block] = []
        self.links: list[Link] = []
        self.sections: list[Section] = []
        self.anchors: list[str] = []  #: of the headings, in order, as GitHub and ModelScope make them
        section, line, spans, text = "", 1, set(), []
        for place, token in enumerate(tokens):
            line = token.map[0] + 1 if token.map else line
            if token.type == "heading_open":
                self._end_section(section, spans, text)
                section, spans, text = tokens[place + 1].content, set(), []
                self._started = line
                self.anchors.append(_anchor(tokens[place + 1], self.anchors))
                self.blocks.append(Block("heading", int(token.tag[1]), line, section))
            elif token.type == "fence":
                self.blocks.append(Block("code", (token.info, code_without_comments(token)), line, section))
            elif token.type == "html_block":
                self.blocks.append(Block("not run", token.content.strip(), line, section))
            elif token.type == "table_open":
                self.blocks.append(Block("table", _table(tokens, place), line, section))
            elif token.type in ("bullet_list_open", "ordered_list_open"):
                self.blocks.append(Block("list", _items(tokens, place), line, section))
            elif token.type == "inline":
                spans |= {child.content for child in token.children if child.type == "code_inline"}
                text.append(_text(token))
                self.links += [Link(*_target(child), line, section) for child in token.children if _target(child)]
        self._end_section(section, spans, text)

    _started = 1

    def _end_section(self, title: str, spans: set[str], text: list[str]) -> None:
        self.sections.append(Section(title, self._started, frozenset(spans), "\n".join(text)))


def code_without_comments(fence: Token) -> tuple[str, ...]:
    """The lines of a block of code; comments of programs, which are translated, are left out."""
    lines = fence.content.splitlines()
    if fence.info in ("sh", "python", "yaml"):
        lines = [re.sub(r"(^|\s)#.*", "", line) for line in lines]
    return tuple(line.rstrip() for line in lines)


def up_to_the_description(line: str) -> str:
    """What precedes the first gap of two spaces: `cli/` of `    cli/      the command`, with its indentation."""
    return re.match(r"\s*.*?(?=\s{2,}|$)", line)[0]


def is_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def _table(tokens: list[Token], place: int) -> tuple[tuple[str, ...], ...]:
    """The cells row by row, each reduced to what no language changes: its code and its numbers."""
    rows: list[list[str]] = []
    for token in tokens[place:]:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(" ".join(sorted(numbers_and_code(token))))
        elif token.type == "table_close":
            break
    return tuple(tuple(row) for row in rows)


def numbers_and_code(inline: Token) -> set[str]:
    code = {f"`{child.content}`" for child in inline.children if child.type == "code_inline"}
    return code | numbers(_text(inline))


def _text(inline: Token) -> str:
    """The words of a paragraph, heading or cell; a backtick stands for what is set as code."""
    stand_ins = {"code_inline": "`", "softbreak": " ", "hardbreak": " "}
    return "".join(
        child.content if child.type == "text" else stand_ins.get(child.type, "") for child in inline.children
    )


def numbers(text: str, *, counted: bool = False) -> set[str]:
    """Numbers in digits; only if `counted` also those before a unit of counting, which languages divide differently."""
    unit = "" if counted else r"(?!\s?(?:million|billion|thousand|[万亿千]|[BM]\b))"
    return set(re.findall(rf"(?<![\w.])\d+(?:[.,]\d+)*(?!\d|[.,]\d){unit}", text))


def _items(tokens: list[Token], place: int) -> int:
    inside, count = tokens[place].level + 1, 0
    for token in tokens[place + 1 :]:
        if token.level < inside:
            break
        count += token.type == "list_item_open" and token.level == inside
    return count


def _target(token: Token) -> tuple[str, str] | None:
    name = {"link_open": "href", "image": "src"}.get(token.type)
    if name is None:
        return None
    target, _, anchor = str(token.attrs[name]).partition("#")
    return target, anchor


def _anchor(heading: Token, taken: list[str]) -> str:
    text = "".join(child.content for child in heading.children if child.type in ("text", "code_inline"))
    anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
    return f"{anchor}-{taken.count(anchor)}" if anchor in taken else anchor
