"""The VS Code extension in a real editor, over a language server that follows a script."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sync_api = pytest.importorskip("playwright.sync_api")
from tests.e2e.code_server import (  # noqa: E402
    CHROMIUM,
    CODE_SERVER,
    CodeServer,
    Window,
    running,
    wait_for,
)

EXTENSION = Path(__file__).parents[2] / "editors" / "vscode"
VSIX = EXTENSION / "dist" / "albor.vsix"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        CODE_SERVER is None, reason="needs ALBOR_CODE_SERVER: tests/e2e/get_code_server.sh DIR"
    ),
    pytest.mark.skipif(not VSIX.is_file(), reason="needs the extension: make vsix"),
]

ADD = "def add(a, b):\n    total = a + b\n    return total"
STATUS = {
    "state": "ready",
    "model": "scripted-1m",
    "latency": {"prefill_ms": 1.25, "decode_ms": 20},
}


class Script:
    """What the language server will say, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self._path, self._log = folder / "script.json", folder / "log.jsonl"
        self.write()

    @property
    def environment(self) -> dict[str, str]:
        return {"SCRIPT": str(self._path), "LOG": str(self._log)}

    def write(self, **changes: Any) -> None:
        """Start over with the usual answers and these changes."""
        script = {"suggestions": [ADD], "status": STATUS} | changes
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(script))
        new.replace(self._path)
        self._log.write_text("")

    def messages(self, method: str) -> list[dict[str, Any]]:
        """What was asked with `method` since the last `write`."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [line for line in lines if line["method"] == method]

    def pids(self) -> set[int]:
        return {json.loads(line)["pid"] for line in self._log.read_text().splitlines()}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("script"))


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory, script: Script) -> Iterator[CodeServer]:
    home = tmp_path_factory.mktemp("home")
    # Where pipx and uv put programs: found without a PATH or a setting.
    program = home / ".local" / "bin" / "albor-lsp"
    program.parent.mkdir(parents=True)
    source = Path(__file__).with_name("scripted_lsp.py").read_text()
    program.write_text(source.replace("/usr/bin/env python3", sys.executable))
    program.chmod(0o755)
    with running(CodeServer(home, [VSIX], script.environment, {})) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    opened = browser.new_context(viewport={"width": 1100, "height": 700})
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared_window(
    context: Any, editor: CodeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Window]:
    folder = tmp_path_factory.mktemp("project")
    for name in ("start.py", "notes.md", "start.js"):
        (folder / name).write_text("")
    window = Window(context.new_page(), editor, folder)
    yield window
    window.page.close()


@pytest.fixture
def window(
    shared_window: Window,
    editor: CodeServer,
    script: Script,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> Iterator[Window]:
    """The window with an empty Python file in front."""
    editor.write_settings({})
    script.write()
    page = shared_window.page
    page.keyboard.press("Escape")
    shared_window.run("View: Close All Editors")
    shared_window.open("start.py")
    shared_window.press("Control+a", "Delete")
    shared_window.wait_status("ready")
    yield shared_window
    shared_window.screenshot(tmp_path / f"{request.node.name}.png")
    shared_window.press("Escape", "Control+a", "Delete")
    shared_window.save()


def test_first_start_opens_the_walkthrough_and_asks_nobody_else(
    shared_window: Window, script: Script
) -> None:
    page = shared_window.page
    page.locator(".gettingStartedContainer", has_text="Start with albor").wait_for()
    assert shared_window.notifications() == []
    assert shared_window.strangers == set()
    # No file was opened yet, so nothing was started.
    assert script.pids() == set()


def test_tab_accepts_everything_and_one_undo_takes_it_back(window: Window, script: Script) -> None:
    window.type("def add(")
    window.wait_ghost("a, b):")
    window.press("Tab")
    assert window.code() == ADD
    wait_for(lambda: script.messages("workspace/executeCommand"), "word of the acceptance")
    told = script.messages("workspace/executeCommand")[0]["params"]
    assert told["command"] == "scripted.accepted"
    window.press("Control+z")
    assert window.code() == "def add("


def test_accepts_by_word_and_by_line(window: Window) -> None:
    window.type("def ad")
    window.wait_ghost("d(a, b):")
    window.press("Control+ArrowRight")
    wait_for(lambda: window.code() == "def add", "accepted word")
    window.wait_ghost("(a, b):")
    window.press("Control+Alt+ArrowRight")
    wait_for(lambda: window.code().rstrip("\n") == "def add(a, b):", "accepted line")
    window.press("Tab")


def test_typing_what_is_suggested_keeps_the_rest(window: Window) -> None:
    window.type("def ")
    window.wait_ghost("add(a, b):")
    for typed in "add(a":
        window.type(typed)
        assert window.ghost() != "" or window.wait_ghost()
    assert window.wait_ghost().startswith(", b):")
    window.type("x")
    wait_for(lambda: window.ghost() == "", "end of the suggestion")


def test_escape_hides_and_the_key_asks_again(window: Window) -> None:
    window.type("def add")
    window.wait_ghost("(a, b)")
    window.press("Escape")
    wait_for(lambda: window.ghost() == "", "end of the suggestion")
    window.press("Alt+\\")
    window.wait_ghost("(a, b)")
