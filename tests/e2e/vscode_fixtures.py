"""What the tests of the VS Code extension share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
from tests.e2e.code_server import CHROMIUM, CODE_SERVER  # noqa: E402

__all__ = ["EXTENSION", "FLAGS", "ROOT", "VSIX", "browser", "context", "marks", "real_lsp"]

ROOT: Final = Path(__file__).parents[2]
EXTENSION: Final = ROOT / "editors" / "vscode"
VSIX: Final = EXTENSION / "dist" / "albor.vsix"
FLAGS: Final = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

marks: Final = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        CODE_SERVER is None, reason="needs code-server: sh tests/e2e/get_code_server.sh"
    ),
    pytest.mark.skipif(not VSIX.is_file(), reason="needs the extension: make vsix"),
]


def real_lsp(path: Path) -> None:
    """Write a program at `path` that is the language server of this source tree."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:0] = {[str(ROOT / 'lsp'), str(ROOT)]!r}\n"
        "from albor_lsp.cli import main\nsys.exit(main())\n"
    )
    path.chmod(0o755)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    opened = browser.new_context(viewport={"width": 1000, "height": 600})
    yield opened
    opened.close()
