"""VS Code with the real language server and whatever can be wrong: quiet, usable, and told how."""

from __future__ import annotations

import http.server
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from tests.e2e.code_server import CodeServer, Window, free_port, running, wait_for
from tests.e2e.vscode_fixtures import ROOT, VSIX, browser, context, marks, real_lsp

__all__ = ["browser", "context"]

pytestmark = marks


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CodeServer]:
    home = tmp_path_factory.mktemp("home")
    real_lsp(home / ".local" / "bin" / "albor-lsp")
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        "XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("run")),
        "PYTHONPATH": modules,
    }
    with running(CodeServer(home, [VSIX], environment, {"albor.startServer": False})) as server:
        yield server


@pytest.fixture(scope="module")
def window(
    context: Any, editor: CodeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Window]:
    folder = tmp_path_factory.mktemp("project")
    (folder / "start.py").write_text("")
    opened = Window(context.new_page(), editor, folder)
    opened.page.locator(".gettingStartedContainer").wait_for(timeout=60_000)
    opened.open("start.py")
    yield opened
    opened.page.close()


def still_types(window: Window) -> None:
    """Typing works, nothing pops up, and nothing is suggested."""
    window.press("Control+a", "Delete")
    window.type("def add(a, b):\n    return ")
    wait_for(lambda: window.code() == "def add(a, b):\n    return ", "the text as it was typed")
    assert window.ghost() == ""
    assert window.notifications() == []


def try_settings(window: Window, settings: dict[str, Any], *said: str) -> str:
    """Take the settings, start anew, and type; returns the status, which holds each of `said`."""
    window.set_machine(settings)
    window.run("albor: Restart")
    still_types(window)
    status = window.wait_status(said[0], 60)
    for each in said:
        assert each in status
    return status


def test_no_server(window: Window) -> None:
    try_settings(window, {"albor.startServer": False}, "albor-serve")


def test_a_port_where_nobody_listens(window: Window) -> None:
    port = free_port()
    settings = {"albor.serverUrl": f"http://127.0.0.1:{port}", "albor.startServer": False}
    try_settings(window, settings, str(port))


def test_a_port_where_something_else_answers(window: Window) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        try_settings(window, {"albor.serverUrl": address}, address, "check serverUrl")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_port_where_nobody_ever_answers(window: Window) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = {"albor.serverUrl": f"http://127.0.0.1:{port}", "albor.timeoutMs": 1000}
        try_settings(window, settings, str(port))


def test_an_address_that_is_none(window: Window) -> None:
    try_settings(
        window, {"albor.serverUrl": "localhost:eighty"}, "localhost:eighty", "http://host:port"
    )


def test_no_program_of_the_server(window: Window) -> None:
    settings = {"albor.startServer": True, "albor.serverCommand": ["no-such-program"]}
    try_settings(window, settings, "no-such-program")


def test_no_model(window: Window) -> None:
    code = "import sys; from albor_serve.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "/no/such/model.gguf"]
    settings = {"albor.startServer": True, "albor.serverCommand": command}
    try_settings(window, settings, "/no/such/model.gguf")


def test_no_python(window: Window, editor: CodeServer) -> None:
    """What an upgrade of Python leaves behind: a program whose interpreter is gone."""
    program = editor.home / "stale" / "albor-lsp"
    program.parent.mkdir()
    program.write_text("#!/no/such/python3\n")
    program.chmod(0o755)
    status = try_settings(window, {"albor.path": str(program)}, str(program), "/no/such/python3")
    assert "install albor again" in status


def test_python_without_albor(window: Window, editor: CodeServer) -> None:
    program = editor.home / "bare" / "albor-lsp"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport no_such_albor\n")
    program.chmod(0o755)
    try_settings(window, {"albor.path": str(program)}, str(program), "the log says why")


def test_mended_it_suggests(window: Window, editor: CodeServer) -> None:
    code = "import sys; from albor_serve.cli import main; sys.exit(main())"
    settings = {
        "albor.startServer": True,
        "albor.serverCommand": [sys.executable, "-c", code],
        "albor.minConfidence": 0,
    }
    window.set_machine(settings)
    window.wait_status("ready", 90)
    window.press("Control+a", "Delete")
    window.type("def add(a, b):\n    return ")
    window.wait_ghost()
    window.press("Escape")


def test_nothing_popped_up_and_nobody_was_asked(window: Window) -> None:
    assert window.notifications() == []
    assert window.strangers == set()
    assert Path(window.folder, "start.py").read_text() == ""
