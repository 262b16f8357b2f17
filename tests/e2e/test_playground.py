"""The playground in a real Chromium, over the real server with the embedded model."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli import Server

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("ALBOR_CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

WAIT_MS = 20_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class Page:
    """The open page and everything it complained of or fetched from elsewhere."""

    def __init__(self, browser: sync_api.Browser, url: str, scheme: str) -> None:
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1000, "height": 880})
        self.page = context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None,
        )
        self.page.on(
            "request",
            lambda r: None if r.url.startswith(url) else self.strangers.append(r.url),
        )
        self.page.goto(url)
        self.page.wait_for_selector(".cm-content")

    def replace_code(self, text: str) -> None:
        """Type `text` over everything, key by key."""
        self.page.click(".cm-content")
        self.page.keyboard.press("Control+a")
        self.page.keyboard.press("Delete")
        for index, line in enumerate(text.split("\n")):
            if index:
                self.page.keyboard.press("Enter")
                self.page.keyboard.press("Shift+Home")  # no indentation but the typed one
            self.page.keyboard.type(line, delay=15)

    def ghost(self) -> str:
        return self.page.locator(".ghost").inner_text()

    def code(self) -> str:
        """The document, ghost text left out."""
        script = """() => {
            const lines = document.querySelector('#editor').shadowRoot.querySelectorAll('.cm-line');
            return [...lines].map((line) => {
                const copy = line.cloneNode(true);
                copy.querySelectorAll('.ghost').forEach((ghost) => ghost.remove());
                return copy.textContent;
            }).join('\\n');
        }"""
        text = self.page.evaluate(script)
        assert isinstance(text, str)
        return text

    def suggested(self) -> str:
        """Wait for a finished suggestion and return it."""
        self.page.wait_for_selector(".ghost")
        self.page.wait_for_function(
            "() => { const r = document.querySelector('#editor').shadowRoot;"
            " const g = r.querySelector('.ghost');"
            " const said = document.querySelector('#spoken').textContent;"
            " return g && said.endsWith(g.textContent); }"
        )
        return self.ghost()


@pytest.fixture(params=["light", "dark"])
def page(
    request: pytest.FixtureRequest, browser: sync_api.Browser, server: Server
) -> Iterator[Page]:
    opened = Page(browser, server.url, request.param)
    yield opened
    if folder := os.environ.get("ALBOR_ARTEFACTS"):
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        opened.page.screenshot(path=path / f"playground-{request.node.name}.png")
    opened.page.context.close()
    assert opened.complaints == []
    assert opened.strangers == []


CODE = "def mean(values):\n    return "


def test_typing_shows_ghost_text_and_tab_accepts_it(page: Page) -> None:
    page.replace_code(CODE)
    before = page.code()
    ghost = page.suggested()
    assert ghost.strip()
    assert page.code() == before
    page.page.keyboard.press("Tab")
    assert page.code() == before + ghost


def test_a_word_is_accepted_and_escape_hides_the_rest(page: Page) -> None:
    page.replace_code(CODE)
    before, ghost = page.code(), page.suggested()
    page.page.keyboard.press("Control+ArrowRight")
    accepted = page.code().removeprefix(before)
    assert accepted
    assert ghost.startswith(accepted)
    assert len(accepted) < len(ghost)
    assert page.ghost() == ghost.removeprefix(accepted)
    page.page.keyboard.press("Escape")
    assert page.page.locator(".ghost").count() == 0
    assert page.code() == before + accepted


def test_typing_what_is_suggested_asks_nothing(page: Page) -> None:
    page.replace_code(CODE)
    ghost = page.suggested()
    asked: list[str] = []
    page.page.on("request", lambda request: asked.append(request.url))
    page.page.keyboard.type(ghost[:2])
    page.page.wait_for_timeout(300)
    assert page.ghost() == ghost[2:]
    assert asked == []


def test_timings_and_probabilities_are_shown(page: Page) -> None:
    page.replace_code(CODE)
    page.suggested()
    cells = page.page.locator("#timings tbody tr").first.locator("td").all_inner_texts()
    assert len(cells) == 9
    _, *numbers = cells
    assert all(float(number) >= 0 for number in numbers)
    total_ms, prompt = float(numbers[6]), int(numbers[1]) + int(numbers[2])
    assert total_ms > 0
    assert prompt > 5
    page.page.locator(".ghost span").first.hover()
    tip = page.page.locator("#tip")
    assert tip.is_visible()
    assert "%" in tip.inner_text()
    page.page.mouse.move(5, 5)
    assert not tip.is_visible()
    page.page.locator("#tokens button").first.focus()
    assert tip.is_visible()


def test_tab_leaves_the_editor_when_nothing_is_suggested(page: Page) -> None:
    page.suggested()
    page.page.keyboard.press("Escape")
    before = page.code()
    page.page.keyboard.press("Tab")
    assert page.code() == before
    assert page.page.evaluate("() => document.activeElement.id") != "editor"
