"""The page, in Debian's Chromium: what a person sees, on a desk and on a phone, in light and in dark."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from engine_fast.inference.serving import create_app
from tests.serving.tiny import make_systems

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: tests/browser/install.sh installs it"),
]
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 375, "height": 720}
READ = [
    *(".tokens li", ".name", ".how", ".soft", "#message", "legend", ".choices label", "button", ".value", "h2", "h3"),
    *(".value small", "#key span", "#state", ".lead", ".candidates p", ".pass > span"),
]
SENTENCE = "mon tue wed thu fri"
ATTACK = "<img src=x onerror=document.title='owned'> <script>document.title='owned'</script> mon"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = create_app(make_systems())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


class Visit:
    """A page opened at a size and in a colour scheme, with all that went wrong and all that was fetched."""

    def __init__(self, browser: Any, url: str, size: dict[str, int], scheme: str) -> None:
        context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.page = context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.locator("#state", has_text="ready, 3 models").wait_for()

    def translate(self, text: str) -> None:
        self.page.get_by_label("Sentence to translate").fill(text)
        self.page.get_by_role("button", name="Translate").click()
        self.page.locator("#message", has_text="Translating").wait_for(state="detached")
        self.page.locator("article.busy").first.wait_for(state="detached")


@pytest.fixture(
    params=[(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")], ids=lambda p: f"{p[0]['width']}-{p[1]}"
)
def visit(request: pytest.FixtureRequest, browser: Any, url: str) -> Iterator[Visit]:
    visit = Visit(browser, url, *request.param)
    yield visit
    visit.page.context.close()
    assert visit.problems == []
    assert all(each.startswith((url, "data:image/svg")) for each in visit.requests)


def contrast(page: Any, selector: str) -> float:
    """The least contrast ratio (WCAG 2) of text to its background over all elements that the selector finds."""
    ratios: list[float] = page.locator(selector).evaluate_all(
        """(nodes) => {
          const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
          const rgb = (colours) => {
            canvas.fillStyle = "#fff"; canvas.fillRect(0, 0, 1, 1);
            for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const light = (colour) => {
            const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = colour.map((v) => linear(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          return nodes.filter((node) => node.textContent.trim() && node.getClientRects().length).map((node) => {
            const layers = [];
            for (let at = node; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
            const [a, b] = [light(rgb(layers)), light(rgb([...layers, getComputedStyle(node).color]))];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          });
        }"""
    )
    assert ratios, selector
    return min(ratios)


def test_a_sentence_is_shown_through_all_models(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.locator("#passes label", has_text="4").click()
    visit.translate(SENTENCE)
    assert page.locator("article .name").all_inner_texts() == ["Teacher", "CMLM", "ENGINE"]
    assert page.locator("#overview .bar").count() == 6  # time and energy of each
    assert page.locator("#message").inner_text() == "Done."
    for name, passes, candidates in (("teacher", 1, 0), ("cmlm", 4, 5), ("engine", 4, 3)):
        card = page.locator(f"article.{name}")
        assert card.locator("ul.tokens").count() == passes
        assert card.locator(".candidates > li").count() == candidates
        assert card.locator(".candidates > li.chosen").count() == min(candidates, 1)
        words = (
            card.locator("ul.tokens")
            .last.locator("li")
            .evaluate_all("(items) => items.map((item) => item.firstChild.textContent)")
        )
        assert " ".join(words) == card.locator(".translation").inner_text()
        repeats = sum(one == other for one, other in pairwise(words))
        assert card.locator("ul.tokens").last.locator("li.repeated").count() == repeats
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_everything_can_be_read(visit: Visit) -> None:
    page = visit.page
    page.locator("#passes label", has_text="10").click()
    visit.translate(SENTENCE)
    page.locator("details").evaluate_all("(nodes) => { for (const node of nodes) node.open = true; }")
    for selector in READ:
        assert contrast(page, selector) >= 4.5, selector
    smallest = page.locator("button, .choices label, .check").evaluate_all(
        "(nodes) => Math.min(...nodes.map((node) => node.getBoundingClientRect().height))"
    )
    assert smallest >= 24


def test_values_come_with_the_pointer_and_with_the_keyboard(visit: Visit) -> None:
    page = visit.page
    visit.translate(SENTENCE)
    tip = page.get_by_role("tooltip")
    assert tip.count() == 0
    tokens = page.locator("article.engine ul.tokens").last.locator("li")
    tokens.nth(1).hover()
    assert "confidence" in tip.inner_text()
    assert "energy" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.count() == 0
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("(node) => node === document.activeElement")
    assert "confidence" in tip.inner_text()
    box = tip.bounding_box()
    assert 0 <= box["x"] <= page.viewport_size["width"] - box["width"]
    page.keyboard.press("End")
    page.keyboard.press("Tab")
    assert not tokens.last.evaluate("(node) => node === document.activeElement")
    assert "confidence" in tokens.first.get_attribute("aria-label")


def test_the_whole_form_works_from_the_keyboard(visit: Visit) -> None:
    page = visit.page
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type(SENTENCE)
    page.keyboard.press("Enter")
    page.locator("#message", has_text="Done.").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # to two passes, which translates again
    page.locator("article.engine .pass").nth(1).wait_for()
    assert page.locator("article.engine .how").inner_text() == "all words at once, 2 passes"
    page.locator("#message", has_text="Done.").wait_for()


def test_markup_is_text(visit: Visit) -> None:
    page = visit.page
    visit.translate(ATTACK)
    page.locator("#message", has_text="not in the vocabulary").wait_for()
    assert page.title() == "engine_fast"
    assert page.locator("main img, main script, main svg").count() == 0
    assert page.locator("#text").input_value() == ATTACK


def test_what_a_server_says_is_text_too(visit: Visit) -> None:
    page = visit.page
    explanation = {
        "model": "engine", "kind": "cmlm", "translation": ATTACK, "seconds": 0.1, "energy": 1.0, "num_unknown": 0,
        "truncated": False, "source": [], "candidates": [
            {"tokens": 1, "probability": 1.0, "score": -1.0, "energy": 1.0, "translation": ATTACK, "chosen": True}
        ],
        "passes": [[{"text": ATTACK, "joined": False, "probability": 0.5, "energy": 1.0, "predicted": True,
                     "repeated": False}]],
    }  # fmt: skip
    page.route("**/explain", lambda route: route.fulfill(json=explanation))
    visit.translate(SENTENCE)
    assert page.locator("article.engine .translation").inner_text() == ATTACK
    assert page.locator("article.engine ul.tokens li").first.inner_text().startswith("<img src=x")
    assert page.locator("main img").count() == 0
    assert page.title() == "engine_fast"


def test_errors_are_told_kindly(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("button", name="Translate").click()
    assert page.locator("#message").inner_text() == "Type a sentence first."
    refusals = [(429, "Many are waiting just now"), (504, "took too long"), (503, "starting or ending")]
    for status, words in refusals:
        page.route("**/explain", lambda route, _, status=status: route.fulfill(status=status, json={"detail": "why"}))
        visit.translate(SENTENCE)
        page.locator("#message.bad", has_text=words).wait_for()
    page.route("**/explain", lambda route: route.abort())
    visit.translate(SENTENCE)
    page.locator("#message.bad", has_text="cannot be reached").wait_for()
    page.unroute_all()
    visit.translate(SENTENCE)
    page.locator("#message", has_text="Done.").wait_for()
    # A browser notes every answer that is no success by itself; that is not the page's doing.
    visit.problems[:] = [each for each in visit.problems if "Failed to load resource" not in each]
