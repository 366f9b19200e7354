"""The page in a real browser: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import queue
import shutil

import pytest

from modelscope_dolly.web.words import EXAMPLES, WORDS
from tests.support.web_page import PATIENCE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra dev brings it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in PATH; Debian's package is chromium")

DESKTOP, PHONE = {"width": 1100, "height": 900}, {"width": 360, "height": 740}
#: A random model that never draws the end: for as long as its answer may be.
LONG = 1024


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, page):
    """Open the page in a context of its own; afterwards no visitor has asked another host, or seen an error."""
    contexts, requests, errors = [], [], []

    def opened(locale: str = "en-US", size: dict = DESKTOP, scheme: str = "light"):
        contexts.append(browser.new_context(locale=locale, viewport=size, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(PATIENCE * 1000)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page.url)
        language = "zh" if locale.startswith("zh") else "en"
        expect(tab.locator("#ask")).to_have_text(WORDS[language]["ask"])
        while not page.endings.empty():
            page.endings.get_nowait()
        return tab

    yield opened
    for context in contexts:
        context.close()
    outside = {url for url in requests if not url.startswith((page.url, "data:", "blob:"))}
    assert requests and not outside and not errors


def expect(locator):
    return _expect(locator)


_expect = playwright.expect
_expect.set_options(timeout=PATIENCE * 1000)


def fill(tab, instruction: str, context: str = "", tokens: int | None = None) -> None:
    """Fill in the form; with `tokens` also the longest answer, without drawing."""
    tab.locator("#instruction textarea").fill(instruction)
    tab.locator("#context textarea").fill(context)
    if tokens is not None:
        if not tab.locator("#max_new_tokens input[type=number]").is_visible():
            tab.locator("#settings button").first.click()
        tab.locator("#do_sample input").set_checked(False)
        tab.locator("#max_new_tokens input[type=number]").fill(str(tokens))
        tab.locator("#max_new_tokens input[type=number]").press("Tab")


def answered(tab, language: str = "en") -> str:
    """The answer, once it has ended."""
    expect(tab.locator("#status")).to_contain_text(WORDS[language]["ended_length"])
    return tab.locator("#answer textarea").input_value()


@pytest.mark.parametrize(
    ("locale", "typed"), [("en-US", "Name a colour."), ("zh-CN", "秋天的落叶像什么？"), ("en-GB", "Say ### End\n\n<b>")]
)
def test_ask(visit, page, locale, typed):
    tab = visit(locale)
    fill(tab, typed, tokens=12)
    tab.locator("#ask").click()
    shown = answered(tab, "zh" if locale == "zh-CN" else "en")
    assert tab.locator("#instruction textarea").input_value() == typed
    assert shown == page.ask(typed, "", 12, False, None)["text"]
    expect(tab.locator("#stop")).to_be_disabled()
    assert page.endings.get(timeout=PATIENCE) == "whole"


def test_the_answer_is_streamed_and_stop_cancels_it(visit, page):
    tab = visit()
    fill(tab, "Name a colour.", tokens=LONG)
    tab.locator("#ask").click()
    expect(tab.locator("#answer textarea")).not_to_have_value("")
    expect(tab.locator("#ask")).to_be_disabled()
    tab.locator("#stop").click()
    expect(tab.locator("#status")).to_contain_text(WORDS["en"]["ended_cancelled"])
    assert page.endings.get(timeout=PATIENCE) == "cancelled"
    begun = tab.locator("#answer textarea").input_value()
    whole = page.ask("Name a colour.", "", LONG, False, None)["text"]
    assert begun and whole.startswith(begun) and len(begun) < len(whole)
    expect(tab.locator("#ask")).to_be_enabled()


def test_clear_cancels_an_answer_and_leaves_an_empty_page(visit, page):
    tab = visit()
    fill(tab, "Name a colour.", tokens=LONG)
    tab.locator("#ask").click()
    expect(tab.locator("#answer textarea")).not_to_have_value("")
    tab.locator("#clear").click()
    assert page.endings.get(timeout=PATIENCE) == "cancelled"
    expect(tab.locator("#ask")).to_be_enabled()
    for place in ("#instruction", "#context", "#answer"):
        expect(tab.locator(f"{place} textarea")).to_have_value("")
    expect(tab.locator("#status")).to_have_text("")


def test_whoever_leaves_frees_the_slot(visit, page):
    tab = visit()
    fill(tab, "Name a colour.", tokens=LONG)
    tab.locator("#ask").click()
    expect(tab.locator("#answer textarea")).not_to_have_value("")
    tab.close()
    assert page.endings.get(timeout=PATIENCE) == "cancelled"


def test_two_tabs_at_once(visit, page):
    first, second = visit(), visit("zh-CN")
    fill(first, "Name a colour.", tokens=200)
    fill(second, "Name a river.", tokens=200)
    first.locator("#ask").click()
    second.locator("#ask").click()
    assert answered(first) == page.ask("Name a colour.", "", 200, False, None)["text"]
    assert answered(second, "zh") == page.ask("Name a river.", "", 200, False, None)["text"]


@pytest.mark.parametrize(("locale", "language"), [("en-US", "en"), ("zh-CN", "zh")])
def test_an_empty_box_and_a_long_text_are_told_in_the_readers_language(visit, page, locale, language):
    tab = visit(locale)
    tab.locator("#ask").click()
    expect(tab.get_by_role("alert")).to_have_text(WORDS[language]["empty"])
    fill(tab, "Shorten it.", "word " * 4000)
    tab.locator("#ask").click()
    expect(tab.get_by_role("alert")).to_contain_text(WORDS[language]["too_long"].split("{tokens}")[0])
    expect(tab.locator("#ask")).to_be_enabled()
    with pytest.raises(queue.Empty):
        while page.endings.get(timeout=0.1) != "whole":
            pass


def test_the_language_can_be_switched_and_what_was_typed_stays(visit):
    tab = visit()
    tab.locator("#instruction textarea").fill("Name a colour.")
    tab.locator("#language").get_by_text("中文").click()
    expect(tab.locator("#ask")).to_have_text(WORDS["zh"]["ask"])
    expect(tab.locator("#limits")).to_contain_text(WORDS["zh"]["limits"])
    expect(tab.locator("#examples button").first).to_contain_text(EXAMPLES[0][1])
    assert tab.locator("#instruction textarea").input_value() == "Name a colour."
    tab.wait_for_function("document.documentElement.lang === 'zh-CN'")


def test_an_example_fills_the_form_and_clear_empties_it(visit):
    tab = visit()
    expect(tab.locator("#examples button")).to_have_count(len(EXAMPLES))
    tab.locator("#examples button").nth(1).click()
    expect(tab.locator("#instruction textarea")).to_have_value(EXAMPLES[1][2])
    expect(tab.locator("#context textarea")).to_have_value(EXAMPLES[1][3])
    tab.locator("#clear").click()
    expect(tab.locator("#instruction textarea")).to_have_value("")
    expect(tab.locator("#context textarea")).to_have_value("")


@pytest.mark.parametrize(("locale", "scheme"), [("en-US", "dark"), ("zh-CN", "light")])
def test_a_phone_shows_everything_without_scrolling_sideways(visit, tmp_path, locale, scheme):
    tab = visit(locale, PHONE, scheme)
    tab.locator("#settings button").first.click()
    tab.locator("#limits button").first.click()
    expect(tab.locator("#truncate_context input")).to_be_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    cut = "e => { const box = e.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; }"
    seen = "#language label, #ask, #stop, #clear, #examples button, #fields input, #limits li"
    assert tab.locator(seen).count() > 20
    assert [e.evaluate("e => e.outerHTML") for e in tab.locator(seen).all() if e.evaluate(cut)] == []
