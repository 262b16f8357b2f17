"""How long a person waits for ghost text in VS Code: albor, or llama.vscode over llama-server.

Each key is pressed in a real editor; a page script takes the time from the key's event to the
first change of the page that shows ghost text for the new text. A key whose ghost text is not
there within the limit counts as not answered. Then the next key follows.

    python -m tests.e2e.measure_vscode albor
    python -m tests.e2e.measure_vscode llama.vscode --vsix FILE --llama-server PROGRAM

Needs ALBOR_CODE_SERVER and Chromium (tests/e2e/get_code_server.sh), and `make vsix`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Browser, sync_playwright

from tests.e2e.code_server import (
    CHROMIUM,
    CodeServer,
    Window,
    activation_ms,
    empty_extension,
    free_port,
    running,
    wait_for,
)
from tests.e2e.vscode_fixtures import FLAGS, ROOT, VSIX, real_lsp

START: Final = '''\
"""A small shop: articles, their prices, and what is in the basket."""

import csv
from dataclasses import dataclass


@dataclass
class Article:
    name: str
    price: float
    stock: int = 0


class Basket:
    def __init__(self):
        self.lines = []

    def add(self, article, count=1):
        if count < 1:
            raise ValueError("count must be positive")
        self.lines.append((article, count))

    def total(self):
        return sum(article.price * count for article, count in self.lines)


'''
TYPED: Final = """\
def read_articles(path):
    articles = []
    with open(path) as file:
        for row in csv.reader(file):
            name, price, stock = row
            articles.append(Article(name, float(price), int(stock)))
    return articles


def cheapest(articles):
    return min(articles, key=lambda article: article.price)
"""
WATCH: Final = """() => {
    const state = window.measured = {pressed: 0, shown: null, changed: false};
    document.addEventListener('keydown', () => {
        state.pressed = performance.now(); state.shown = null; state.changed = false;
    }, true);
    new MutationObserver((records) => {
        state.changed ||= records.some((record) => {
            const node = record.target;
            const element = node.nodeType === 1 ? node : node.parentElement;
            return element !== null && element.closest('.view-lines') !== null;
        });
        if (!state.changed || state.shown !== null) return;
        const ghosts = document.querySelectorAll('.editor-instance [class*="ghost-text"]');
        if ([...ghosts].some((ghost) => ghost.textContent.trim() !== '')) {
            state.shown = performance.now() - state.pressed;
        }
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
PAUSE_MS: Final = 60
SETTLE_MS: Final = 3000
NUM_WINDOWS: Final = 3


def measure(window: Window, num_keys: int, limit_ms: float) -> list[float | None]:
    """Milliseconds to ghost text for each key; None where there was none in time."""
    page = window.page
    page.evaluate(WATCH)
    times: list[float | None] = []
    for key in TYPED[:num_keys]:
        page.keyboard.press("Enter" if key == "\n" else "Space" if key == " " else key)
        with suppress(Exception):
            page.wait_for_function("measured.shown !== null", timeout=limit_ms, polling=15)
        times.append(page.evaluate("measured.shown"))
        page.wait_for_timeout(PAUSE_MS)
    return times


def activations(
    chromium: Browser, server: CodeServer, project: Path, name: str
) -> tuple[list[float | None], list[float | None]]:
    """What new windows say that activating the extension took, and one that does nothing."""
    both = []
    for _ in range(NUM_WINDOWS):
        page = chromium.new_page(viewport={"width": 1100, "height": 700})
        window = Window(page, server, project)
        page.wait_for_timeout(SETTLE_MS)
        both.append((activation_ms(window, name), activation_ms(window, "nothing")))
        page.close()
    return [ours for ours, _ in both], [empty for _, empty in both]


@contextmanager
def llama_server(program: str) -> Iterator[int]:
    """llama-server with the embedded model and the options that its editors' plugins advise."""
    port = free_port()
    model = next((ROOT / "models").glob("*.gguf"))
    options = ["-ub", "1024", "-b", "1024", "--ctx-size", "0", "--cache-reuse", "256"]
    command = [program, "-m", str(model), "--port", str(port), *options]
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(program).parent)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_for(lambda: _is_up(port), "answer from llama-server", 60)
            yield port
        finally:
            process.terminate()


@contextmanager
def albor_serve() -> Iterator[int]:
    """albor-serve with the embedded model."""
    port = free_port()
    code = "import sys; from albor_serve.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--port", str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_for(lambda: _is_up(port), "answer from albor-serve", 60)
            yield port
        finally:
            process.terminate()


def _is_up(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        return bool(answer.status == 200)
    return False


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement: the figures, and under which circumstances."""
    is_ours = arguments.client == "albor"
    with tempfile.TemporaryDirectory(prefix="albor-measure-") as folder:
        home, project = Path(folder, "home"), Path(folder, "project")
        project.mkdir()
        (project / "shop.py").write_text(START)
        (project / "notes.txt").write_text("")
        completion = albor_serve() if is_ours else llama_server(arguments.llama_server)
        with completion as port:
            address = f"http://127.0.0.1:{port}"
            if is_ours:
                real_lsp(home / ".local" / "bin" / "albor-lsp")
            settings = {
                "llama-vscode.endpoint": address,
                "llama-vscode.ask_install_llamacpp": False,
                "llama-vscode.rag_enabled": False,
            }
            server = CodeServer(
                home,
                [
                    VSIX if is_ours else Path(arguments.vsix),
                    empty_extension(Path(folder, "nothing.vsix")),
                ],
                {"ALBOR_SERVER_URL": address},
                {} if is_ours else settings,
            )
            with running(server), sync_playwright() as playwright:
                chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
                page = chromium.new_page(viewport={"width": 1100, "height": 700})
                window = Window(page, server, project)
                if is_ours:
                    page.locator(".gettingStartedContainer").wait_for(timeout=60_000)
                if not is_ours:
                    # It starts with plain text, not with Python.
                    window.open("notes.txt")
                    page.wait_for_timeout(SETTLE_MS)
                window.open("shop.py")
                if is_ours:
                    window.wait_status("ready", 60)
                page.wait_for_timeout(SETTLE_MS)
                window.press("Escape", "Control+End")
                times = measure(window, arguments.keys, arguments.limit_ms)
                if arguments.screenshot:
                    window.screenshot(Path(arguments.screenshot))
                typed = window.code()
                page.close()
                activation, of_nothing = activations(
                    chromium, server, project, arguments.client.replace(".", "-")
                )
                chromium.close()
    shown = sorted(time for time in times if time is not None)
    assert len(shown) > 1, f"no ghost text: the page was {typed!r}"
    return {
        "client": arguments.client,
        "keys": len(times),
        "answered": len(shown),
        "p50_ms": round(statistics.median(shown), 1),
        "p95_ms": round(shown[min(int(0.95 * len(shown)), len(shown) - 1)], 1),
        "p50_all_ms": _median_of_all(times, arguments.limit_ms),
        "limit_ms": arguments.limit_ms,
        "activation_ms": activation,
        "activation_of_nothing_ms": of_nothing,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "times": [None if time is None else round(time, 1) for time in times],
    }


def _median_of_all(times: list[float | None], limit_ms: float) -> float:
    """The median when a key without an answer counts as the limit."""
    return round(statistics.median(limit_ms if t is None else t for t in times), 1)


def main() -> None:
    """Measure one client and print its row; the JSON goes where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("client", choices=("albor", "llama.vscode"))
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--limit-ms", type=float, default=600)
    parser.add_argument("--vsix", help="llama.vscode's package")
    parser.add_argument("--llama-server", help="its server's program")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--screenshot")
    # Ended from outside, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result = run(parser.parse_args())
    names = ["client", "keys", "answered", "p50_ms", "p95_ms", "p50_all_ms", "activation_ms"]
    names += ["activation_of_nothing_ms"]
    print("| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    print("| " + " | ".join(str(result[name]) for name in names) + " |")
    if (path := parser.parse_args().json) is not None:
        path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
