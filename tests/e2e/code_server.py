"""A real VS Code (its code-server build) in a real Chromium, for tests and measurements."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Page
from playwright.sync_api import TimeoutError as PageTimeoutError

__all__ = [
    "CHROMIUM",
    "CODE_SERVER",
    "CodeServer",
    "Window",
    "activation_ms",
    "empty_extension",
    "free_port",
    "running",
    "wait_for",
]

CHROMIUM = os.environ.get("ALBOR_CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_CACHED = _CACHE / "albor-e2e" / "code-server" / "code-server"
#: What the variable names, else what tests/e2e/get_code_server.sh has put into the cache.
CODE_SERVER = os.environ.get("ALBOR_CODE_SERVER") or (str(_CACHED) if _CACHED.is_file() else None)

#: Generous: a machine with other work must not fail a test, and one that passes waits for nothing.
WAIT_MS = 30_000
TRIES = 4
TRY_MS = 6_000
START_S = 60.0
STOP_S = 15.0
TYPING_MS = 35

#: What a person would change first; all else is as it comes. The editor must not add text of its
#: own, so that the file says exactly what was typed and accepted.
SETTINGS: dict[str, Any] = {
    "chat.disableAIFeatures": True,
    "editor.autoClosingBrackets": "never",
    "editor.autoClosingQuotes": "never",
    "editor.autoIndent": "none",
    "editor.minimap.enabled": False,
    "editor.quickSuggestions": {"other": "off", "comments": "off", "strings": "off"},
    "editor.suggestOnTriggerCharacters": False,
    "editor.wordBasedSuggestions": "off",
    "extensions.autoCheckUpdates": False,
    "extensions.ignoreRecommendations": True,
    "files.autoSave": "off",
    "security.workspace.trust.enabled": False,
    "telemetry.telemetryLevel": "off",
    "update.mode": "none",
    "window.restoreWindows": "none",
    "workbench.editor.enablePreview": False,
    "workbench.editor.useModal": "off",
    "workbench.secondarySideBar.defaultVisibility": "hidden",
    "workbench.startupEditor": "none",
}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = WAIT_MS / 1000) -> Any:
    """Poll until `condition` gives something true, and return that; fails naming `what`.

    A time in which this process was stopped or got no CPU counts as one second at most.
    """
    waited, last = 0.0, time.monotonic()
    while waited < seconds:
        if value := condition():
            return value
        time.sleep(0.05)
        now = time.monotonic()
        waited += min(now - last, 1.0)
        last = now
    raise AssertionError(f"after {seconds:.0f} s still no {what}")


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


#: An extension that does nothing, which an activation's cost is compared with.
EMPTY = "tests.nothing"
_EMPTY_MANIFEST = """<?xml version="1.0" encoding="utf-8"?>
<PackageManifest Version="2.0.0" xmlns="http://schemas.microsoft.com/developer/vsx-schema/2011">
<Metadata><Identity Language="en-US" Id="nothing" Version="1.0.0" Publisher="tests"/>
<DisplayName>nothing</DisplayName></Metadata>
<Installation><InstallationTarget Id="Microsoft.VisualStudio.Code"/></Installation><Dependencies/>
<Assets><Asset Type="Microsoft.VisualStudio.Code.Manifest" Path="extension/package.json"/></Assets>
</PackageManifest>"""


def empty_extension(path: Path) -> Path:
    """Write a package at `path` whose extension starts when albor's does, and does nothing."""
    publisher, _, name = EMPTY.partition(".")
    package = {
        "name": name,
        "publisher": publisher,
        "version": "1.0.0",
        "engines": {"vscode": "^1.91.0"},
        "main": "./nothing.js",
        "extensionKind": ["workspace"],
        "activationEvents": ["onStartupFinished"],
    }
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("extension.vsixmanifest", _EMPTY_MANIFEST)
        file.writestr("extension/package.json", json.dumps(package))
        file.writestr("extension/nothing.js", "exports.activate = () => {};\n")
    return path


class CodeServer:
    """code-server with a home of its own and the extensions that are installed into it."""

    def __init__(
        self,
        home: Path,
        vsix: list[Path],
        environment: Mapping[str, str],
        settings: Mapping[str, Any],
        program: str | None = CODE_SERVER,
    ) -> None:
        assert program is not None
        self.home = home
        self.port = free_port()
        self._user_data = home / "user-data"
        self._extensions = home / "extensions"
        (self._user_data / "User").mkdir(parents=True)
        path = self._user_data / "User" / "settings.json"
        path.write_text(json.dumps(SETTINGS | dict(settings), indent=1))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ALBOR_", "VSCODE_"))}
        self._environment = (
            kept | {"EXTENSIONS_GALLERY": "{}", "HOME": str(home)} | dict(environment)
        )
        folders = [
            *("--user-data-dir", str(self._user_data)),
            *("--extensions-dir", str(self._extensions)),
            *("--config", str(home / "code-server.yaml")),
        ]
        for package in vsix:
            subprocess.run(
                [program, *folders, "--install-extension", str(package)],
                env=self._environment,
                check=True,
                capture_output=True,
                timeout=120,
            )
        self._log = (home / "code-server.log").open("w")
        self._process = subprocess.Popen(
            [
                program,
                *folders,
                *("--bind-addr", f"127.0.0.1:{self.port}"),
                *("--auth", "none"),
                "--disable-telemetry",
                "--disable-update-check",
                "--disable-workspace-trust",
                "--disable-getting-started-override",
                "--ignore-last-opened",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        try:
            wait_for(self._is_up, "answer from code-server", START_S)
        except AssertionError:
            self.stop()
            raise

    def _is_up(self) -> bool:
        url = f"http://127.0.0.1:{self.port}/healthz"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def settings(self, where: str = "User") -> dict[str, Any]:
        """The settings on disk: the person's (`User`), or the machine's (`Machine`)."""
        path = self._user_data / where / "settings.json"
        found: dict[str, Any] = json.loads(path.read_text() or "{}") if path.exists() else {}
        return found

    def url(self, folder: Path) -> str:
        """Where a window on `folder` (or on a `.code-workspace` file) opens."""
        kind = "workspace" if folder.suffix == ".code-workspace" else "folder"
        return f"http://127.0.0.1:{self.port}/?{kind}={folder}"

    def children(self) -> list[psutil.Process]:
        """Every process under code-server's."""
        with contextlib.suppress(psutil.NoSuchProcess):
            under: list[psutil.Process] = psutil.Process(self._process.pid).children(recursive=True)
            return under
        return []

    def stop(self) -> list[str]:
        """End it.

        Returns:
            The command lines of the processes under it that outlived it by 15 s; they are killed.
        """
        under = self.children()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(under, STOP_S)
        left = []
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.append(" ".join(process.cmdline()))
                process.kill()
        self._log.close()
        return left


class Window:
    """One window of the editor, on one folder."""

    def __init__(self, page: Page, server: CodeServer, folder: Path) -> None:
        self.page = page
        self.server = server
        self.folder = folder
        self.strangers: set[str] = set()
        page.set_default_timeout(WAIT_MS)
        page.on("request", self._note)
        page.goto(server.url(folder), wait_until="domcontentloaded", timeout=4 * WAIT_MS)
        page.wait_for_selector(".monaco-workbench .part.statusbar", timeout=4 * WAIT_MS)

    def _note(self, request: Any) -> None:
        if request.url.startswith("http") and f"127.0.0.1:{self.server.port}" not in request.url:
            self.strangers.add(request.url)

    # What a person does

    def open(self, name: str, anyway: bool = False) -> None:
        """Open a file of the folder by name, or any by its full path; the cursor goes to its end.

        With `anyway` the editor is expected to ask first, as for a huge or binary file.
        """
        # A full path needs no search of the folder.
        path = self.folder / name
        name = path.name
        self._choose("Control+p", str(path), f'[aria-label^="{name}"]')
        self.page.locator(f'.tab.active[data-resource-name="{name}"]').wait_for()
        if anyway:
            self.page.locator(".monaco-editor-pane-placeholder", has_text="Open Anyway").wait_for()
            self.page.get_by_text("Open Anyway").click()
            choice = self.page.locator(".quick-input-list .monaco-list-row", has_text="Text Editor")
            lines = self.page.locator(".editor-instance .view-line")
            choice.or_(lines).first.wait_for(timeout=2 * WAIT_MS)
            if choice.count() > 0:
                choice.first.click()
        self.page.wait_for_selector(".editor-instance .view-line")
        self.page.keyboard.press("Control+End")

    def run(self, title: str) -> None:
        """Carry out a command of the palette by its full title."""
        self._choose("F1", ">" + title, f'[aria-label^="{title}"]')

    def set(self, settings: Mapping[str, Any]) -> None:
        """Replace the person's settings, in the editor: this build does not watch the file."""
        self._set("User", SETTINGS | dict(settings))

    def set_machine(self, settings: Mapping[str, Any]) -> None:
        """Replace the settings of the machine that the extension runs on."""
        self._set("Remote", settings)

    def _set(self, title: str, wanted: Mapping[str, Any]) -> None:
        where = {"User": "User", "Remote": "Machine"}[title]
        if self.server.settings(where) == wanted:
            return
        front = self.page.locator(".tab.active").get_attribute("data-resource-name")
        self.run(f"Preferences: Open {title} Settings (JSON)")
        self.page.locator('.tab.active[data-resource-name="settings.json"]').wait_for()
        self.page.locator(".editor-instance .monaco-editor.focused").first.wait_for()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.press("Delete")
        wait_for(lambda: self.code() == "", "empty settings")
        self.page.keyboard.insert_text(json.dumps(wanted))
        self.save()
        assert self.server.settings(where) == wanted
        self.run("View: Close Editor")
        if front is not None:
            self.page.locator(f'.tab.active[data-resource-name="{front}"]').wait_for()

    def _choose(self, key: str, text: str, row: str) -> None:
        box = self.page.locator(".quick-input-widget input")
        list_row = self.page.locator(f".quick-input-list .monaco-list-row{row}").first
        for attempt in range(TRIES):
            # Whatever takes the focus at this moment closes the list.
            try:
                box.wait_for(state="hidden", timeout=TRY_MS)
                self.page.keyboard.press(key)
                box.wait_for(state="visible", timeout=TRY_MS)
                box.fill(text, timeout=TRY_MS)
                list_row.click(timeout=TRY_MS)
            except PageTimeoutError:
                if attempt == TRIES - 1:
                    raise
                self.page.keyboard.press("Escape")
            else:
                return

    def type(self, text: str, delay_ms: float = TYPING_MS) -> None:
        """Type, key by key."""
        self.page.keyboard.type(text, delay=delay_ms)

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        for key in keys:
            self.page.keyboard.press(key)

    def save(self) -> None:
        """Save the file in front and wait until it is written."""
        self.page.keyboard.press("Control+s")
        self.page.wait_for_selector(".tab.active:not(.dirty)")

    # What a person sees

    def ghost(self) -> str:
        """The ghost text now, lines joined; empty without any."""
        script = """() => {
            const ghosts = [...document.querySelectorAll('.editor-instance [class*="ghost-text"]')];
            const lines = new Map();
            for (const ghost of ghosts) {
                if (ghost.parentElement.closest('[class*="ghost-text"]')) continue;
                const line = ghost.closest('.view-line') ?? ghost;
                lines.set(line, (lines.get(line) ?? '') + ghost.textContent);
            }
            const top = (line) => line.getBoundingClientRect().top;
            const sorted = [...lines].sort((a, b) => top(a[0]) - top(b[0]));
            return sorted.map((entry) => entry[1]).join('\\n');
        }"""
        text = self.page.evaluate(script)
        assert isinstance(text, str)
        return text.replace("\u00a0", " ").replace("\u00b7", " ")

    def wait_ghost(self, text: str = "", seconds: float = WAIT_MS / 1000) -> str:
        """Wait for ghost text that holds `text`, and return it."""
        found: str = wait_for(
            lambda: ghost if (ghost := self.ghost()).strip() and text in ghost else "",
            f"ghost text with {text!r}",
            seconds,
        )
        return found

    def code(self) -> str:
        """The text of the editor in front as a copy of it would give it, ghost text left out."""
        script = """() => {
            const found = document.querySelectorAll('.editor-instance .view-lines > .view-line');
            const lines = [...found];
            lines.sort((a, b) => parseFloat(a.style.top) - parseFloat(b.style.top));
            return lines.map((line) => {
                const copy = line.cloneNode(true);
                copy.querySelectorAll('[class*="ghost-text"]').forEach((ghost) => ghost.remove());
                return copy.textContent;
            }).join('\\n');
        }"""
        text = self.page.evaluate(script)
        assert isinstance(text, str)
        return text.replace("\u00a0", " ").replace("\u00b7", " ")

    def status(self) -> str:
        """The status bar item: its text, and its tooltip as a screen reader gets it."""
        item = self.page.locator('.statusbar-item[id="albor.albor.albor.status"]')
        if item.count() == 0:
            return ""
        label = item.first.locator("a").get_attribute("aria-label") or ""
        return f"{item.first.inner_text()} | {label}"

    def point_at_status(self) -> str:
        """Hold the pointer over the status bar item; returns what pops up."""
        self.page.locator('.statusbar-item[id="albor.albor.albor.status"]').hover()
        box = self.page.locator(".monaco-hover:visible", has_text="Click for the menu")
        box.first.wait_for()
        return box.first.inner_text()

    def wait_status(self, text: str, seconds: float = WAIT_MS / 1000) -> str:
        """Wait until the status bar item holds `text`."""
        try:
            found: str = wait_for(
                lambda: status if text in (status := self.status()) else "",
                f"status with {text!r}",
                seconds,
            )
        except AssertionError as error:
            raise AssertionError(f"{error}: it is {self.status()!r}") from None
        return found

    def pick(self, label: str) -> None:
        """Pick an entry of the list that is open."""
        self.page.locator(".quick-input-list .monaco-list-row", has_text=label).first.click()

    def text_of_tab(self, title: str) -> str:
        """The text of the page that is open under `title`, as soon as there is any."""
        tab = self.page.locator(f'.tab[data-resource-name="{title}"]')
        lines = self.page.locator(".editor-group-container", has=tab).locator(".view-line")
        found: str = wait_for(
            lambda: "\n".join(lines.all_text_contents()).strip(), f"text of {title}"
        )
        return found.replace("\u00a0", " ")

    def notifications(self) -> list[str]:
        """The boxes that have popped up."""
        return self.page.locator(".notification-toast").all_inner_texts()

    def screenshot(self, path: Path, corner: tuple[int, int] | None = None) -> None:
        """Save what is to be seen as a PNG file; with `corner`, the lower right of that size."""
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self.page.viewport_size
        if corner is None or size is None:
            self.page.screenshot(path=path)
            return
        width, height = corner
        left, top = size["width"] - width, size["height"] - height
        self.page.screenshot(
            path=path, clip={"x": left, "y": top, "width": width, "height": height}
        )


def activation_ms(window: Window, name: str) -> float | None:
    """What the editor says that loading and activating an extension took; None if it doesn't.

    The window is made high: rows out of sight are not in the page.
    """
    window.page.set_viewport_size({"width": 1000, "height": 1800})
    window.run("Developer: Show Running Extensions")
    rows = window.page.locator(".runtime-extensions-editor .monaco-list-row", has_text=name)

    def found() -> re.Match[str] | None:
        texts = " ".join(rows.all_inner_texts())
        return re.search(r"Activation: (\d+)ms", texts)

    try:
        return float(wait_for(found, f"activation of {name}", 10)[1])
    except AssertionError:
        return None


@contextlib.contextmanager
def running(server: CodeServer) -> Iterator[CodeServer]:
    """Stop the server at the end, and complain if a process outlives it."""
    try:
        yield server
    finally:
        left = server.stop()
    assert left == [], f"outlived the editor: {left}"
