"""docs/editors.md's configuration in a real Neovim, with the real servers and model."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.neovim import Neovim, until
from tests.e2e.stack import CODE, editor

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def neovim(tmp_path: Path) -> Iterator[Neovim]:
    program = editor("nvim", "ALBOR_NVIM")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (0, 12):
        pytest.skip("this Neovim has no inline completion: 0.12 is the first")
    file = tmp_path / "project" / "stats.py"
    file.parent.mkdir()
    file.write_text(CODE)
    [code] = re.findall(r"```lua\n(.*?)```", (ROOT / "docs/editors.md").read_text(), re.DOTALL)
    running = Neovim(program, tmp_path, file, code)
    yield running
    running.close()


def ask(neovim: Neovim) -> str:
    """Type until there is ghost text: the first keys may come before the server is up."""
    neovim.type("6GA")

    def shown() -> bool:
        neovim.type("<BS>o" if neovim.line(6).endswith("so") else "so")
        time.sleep(0.5)
        return bool(neovim.ghost())

    until(shown)
    return neovim.ghost()


def test_ghost_text_is_shown_accepted_and_undone_in_one_step(neovim: Neovim) -> None:
    ghost = ask(neovim)
    before = neovim.line(6)
    neovim.type("<Tab>")
    until(lambda: neovim.line(6) == before + ghost)
    assert not neovim.ghost()
    neovim.type("<C-\\><C-n>u")
    until(lambda: neovim.line(6) == "    ordered = ")


def test_tab_is_tab_where_nothing_is_shown(neovim: Neovim) -> None:
    neovim.type("3GA")
    assert not neovim.ghost()
    neovim.type("<Tab>")
    until(lambda: neovim.line(3).isspace())  # as the file type has it: spaces or a tab
