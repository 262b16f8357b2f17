"""docs/editors.md's configuration in a real Neovim, with the real servers and model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import CODE, editor, environment

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
GHOST = """
local texts = {}
for name, id in pairs(vim.api.nvim_get_namespaces()) do
  if name:find('inline_completion') then
    for _, mark in ipairs(vim.api.nvim_buf_get_extmarks(0, id, 0, -1, {details = true})) do
      for _, part in ipairs(mark[4].virt_text or {}) do texts[#texts + 1] = part[1] end
    end
  end
end
return table.concat(texts)
"""


class Neovim:
    """A headless Neovim that is told what to type."""

    def __init__(self, program: str, home: Path, file: Path) -> None:
        self._program = program
        self._socket = str(home / "nvim.sock")
        [code] = re.findall(r"```lua\n(.*?)```", (ROOT / "docs/editors.md").read_text(), re.DOTALL)
        config = home / "init.lua"
        config.write_text(code)
        command = [program, "--headless", "-u", str(config), "--listen", self._socket, str(file)]
        self.process = subprocess.Popen(
            command, env=environment(home), cwd=file.parent, stderr=subprocess.DEVNULL
        )
        until(lambda: os.path.exists(self._socket))

    def type(self, keys: str) -> None:
        self._remote("--remote-send", keys)

    def lua(self, code: str) -> Any:
        quoted = code.replace("'", "''")
        wrapped = f"json_encode(luaeval('(function() {' '.join(quoted.split())} end)()'))"
        return json.loads(self._remote("--remote-expr", wrapped))

    def ghost(self) -> str:
        return str(self.lua(GHOST))

    def line(self, number: int) -> str:
        return str(self.lua(f"return vim.fn.getline({number})"))

    def close(self) -> None:
        if self.process.poll() is None:
            self.type("<C-\\><C-n>:qa!<CR>")
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _remote(self, *arguments: str) -> str:
        result = subprocess.run(
            [self._program, "--headless", "--server", self._socket, *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return result.stdout or result.stderr


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def neovim(tmp_path: Path) -> Iterator[Neovim]:
    program = editor("nvim", "ALBOR_NVIM")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (0, 12):
        pytest.skip("this Neovim has no inline completion: 0.12 is the first")
    file = tmp_path / "project" / "stats.py"
    file.parent.mkdir()
    file.write_text(CODE)
    running = Neovim(program, tmp_path, file)
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
