"""VS Code with the real extension, language server, completion server and embedded model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("playwright.sync_api")
from tests.e2e.code_server import (
    CodeServer,
    Window,
    free_port,
    running,
    wait_for,
)
from tests.e2e.vscode_fixtures import (
    EXTENSION,
    ROOT,
    VSIX,
    browser,
    context,
    marks,
    real_lsp,
)

__all__ = ["browser", "context"]

pytestmark = marks

START = '''\
class Shelf:
    """Books, by title."""

    def __init__(self, books):
        self.books = books

    def titles(self):
        return [book.title for book in self.books]

'''
TYPED = "    def authors(self):\n        return "
#: Whether there is ghost text must not depend on how sure the model is with other files beside.
#: The last test starts with the settings as they come.
SURE = {"albor.minConfidence": 0, "albor.otherFiles": False}


class Completion:
    """albor-serve on one port, which can go and come back."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        code = "import sys; from albor_serve.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "--port", str(self.port)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def completion() -> Iterator[Completion]:
    started = Completion()
    yield started
    started.kill()


@pytest.fixture(scope="module")
def editor(
    tmp_path_factory: pytest.TempPathFactory, completion: Completion
) -> Iterator[CodeServer]:
    home = tmp_path_factory.mktemp("home")
    real_lsp(home / ".local" / "bin" / "albor-lsp")
    address = {"ALBOR_SERVER_URL": f"http://127.0.0.1:{completion.port}"}
    with running(CodeServer(home, [VSIX], address, SURE)) as server:
        yield server


@pytest.fixture(scope="module")
def window(
    context: Any, editor: CodeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Window]:
    folder = tmp_path_factory.mktemp("project")
    for name in ("shelf.py", "second.py", "third.py", "fourth.py"):
        (folder / name).write_text(START)
    opened = Window(context.new_page(), editor, folder)
    opened.page.locator(".gettingStartedContainer").wait_for(timeout=60_000)
    shot(opened, "walkthrough")
    yield opened
    opened.page.close()


def shot(window: Window, name: str, corner: tuple[int, int] | None = None) -> None:
    """Keep a picture where ALBOR_ARTEFACTS says."""
    if folder := os.environ.get("ALBOR_ARTEFACTS"):
        window.screenshot(Path(folder) / f"vscode-{name}.png", corner)


def test_types_sees_and_accepts(window: Window) -> None:
    window.open("shelf.py")
    window.wait_status("ready")
    window.type(TYPED)
    ghost = window.wait_ghost()
    shot(window, "ghost")
    status = window.status()
    assert "Model: " in status
    assert re.search(r"Last suggestion: .* ms", status)
    window.point_at_status()
    shot(window, "status", (700, 360))
    window.press("Tab")
    accepted = START + TYPED + ghost.lstrip("\n")
    wait_for(lambda: window.code().startswith(accepted.split("\n")[0]), "accepted text")
    shot(window, "accepted")
    window.press("Escape")
    window.save()
    on_disk = (window.folder / "shelf.py").read_text()
    assert on_disk.startswith(START + TYPED)
    assert on_disk[len(START + TYPED) :].strip() != ""
    window.press("Control+z")
    window.press("Escape")
    window.save()
    assert (window.folder / "shelf.py").read_text() == START + TYPED


def test_accepts_a_word_and_types_through(window: Window) -> None:
    window.open("second.py")
    window.type(TYPED)
    ghost = window.wait_ghost().partition("\n")[0]
    window.type(ghost[:2])
    assert window.wait_ghost().startswith(ghost[2:4])
    window.press("Control+ArrowRight")
    window.page.wait_for_timeout(500)
    window.press("Escape")
    window.save()
    text = (window.folder / "second.py").read_text()[len(START + TYPED) :]
    assert len(text) > 2
    assert ghost.startswith(text)


def test_accepts_a_line(window: Window) -> None:
    window.open("third.py")
    window.type(TYPED)
    first, _, _ = window.wait_ghost().partition("\n")
    window.press("Control+Alt+ArrowRight")
    window.page.wait_for_timeout(500)
    window.press("Escape")
    window.save()
    text = (window.folder / "third.py").read_text()[len(START + TYPED) :]
    assert text.rstrip() == first.rstrip()


def test_explains_the_last_suggestion_and_counts(window: Window) -> None:
    window.run("albor: Explain the Last Suggestion")
    assert "The last suggestion" in window.text_of_tab("explanation.md")
    shot(window, "explanation")
    window.run("View: Close All Editors")
    window.run("albor: Show Statistics")
    assert "shown" in window.text_of_tab("statistics.md").lower()
    window.run("View: Close All Editors")


def test_the_server_dies_and_comes_back(window: Window, completion: Completion) -> None:
    window.open("fourth.py")
    window.wait_status("ready")
    completion.kill()
    window.type("    def ")
    wait_for(lambda: "ready" not in window.status(), "word of the outage")
    shot(window, "offline")
    window.type("years(self):\n        ")
    assert window.code().endswith("years(self):\n        ")
    assert window.notifications() == []
    completion.start()
    window.wait_status("ready", 60)
    window.type("return ")
    window.wait_ghost()
    window.press("Escape")
    window.run("File: Revert File")


def test_two_windows_each_with_a_language_server(
    window: Window, editor: CodeServer, context: Any
) -> None:
    other = Window(context.new_page(), editor, window.folder)
    other.open("fourth.py")
    other.wait_status("ready")
    other.type(TYPED)
    other.wait_ghost()
    servers = [p for p in editor.children() if "albor-lsp" in " ".join(p.cmdline())]
    assert len(servers) == 2
    other.run("File: Revert File")
    other.page.close()
    window.page.bring_to_front()


def test_nothing_was_asked_of_anybody_else(window: Window) -> None:
    assert window.strangers == set()


def test_the_installed_extension_is_small() -> None:
    assert VSIX.stat().st_size < 400_000
    unpacked = sum(file.stat().st_size for file in (EXTENSION / "dist").glob("*.js"))
    assert unpacked < 1_000_000
    # What every window loads; the rest comes with the first file. measure_vscode.py has the times.
    assert (EXTENSION / "dist" / "extension.js").stat().st_size < 25_000


def test_starts_everything_by_itself_and_leaves_nothing(
    browser: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No server runs and none is named, something else has its usual port, and the machine is
    offline: every proxy is dead."""
    home, project = tmp_path / "home", tmp_path / "project"
    # A short path: the server listens on a socket below it.
    runtime = tmp_path_factory.mktemp("run")
    project.mkdir()
    (project / "shelf.py").write_text(START)
    real_lsp(home / ".local" / "bin" / "albor-lsp")
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    dead = f"http://127.0.0.1:{free_port()}"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), dead)
    environment = proxies | {"XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": modules}

    def of_this_test() -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if str(runtime) in _command_line(p)]

    with usual_port_taken(), running(CodeServer(home, [VSIX], environment, {})) as server:
        window = Window(browser.new_page(), server, project)
        window.page.locator(".gettingStartedContainer").wait_for(timeout=60_000)
        window.open("shelf.py")
        window.wait_status("ready", 60)
        window.type(TYPED)
        window.wait_ghost()
        assert of_this_test() != []
        window.press("Escape")
        window.run("File: Revert File")
        window.page.close()
    wait_for(lambda: of_this_test() == [], "end of albor-serve", 60)


@contextmanager
def usual_port_taken() -> Iterator[None]:
    """Something that never answers listens on albor-serve's usual port, unless it is taken."""
    with ExitStack() as held:
        with suppress(OSError):
            held.enter_context(socket.create_server(("127.0.0.1", 8080)))
        yield


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
