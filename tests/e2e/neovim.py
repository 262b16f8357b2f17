"""A headless Neovim that is told what to type."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.stack import environment

__all__ = ["Neovim", "until"]

GHOST = """
local texts = {}
for name, id in pairs(vim.api.nvim_get_namespaces()) do
  if name:find('inline_completion') then
    for _, mark in ipairs(vim.api.nvim_buf_get_extmarks(0, id, 0, -1, {details = true})) do
      for _, part in ipairs(mark[4].virt_text or {}) do texts[#texts + 1] = part[1] end
      for _, line in ipairs(mark[4].virt_lines or {}) do
        texts[#texts + 1] = string.char(10)
        for _, part in ipairs(line) do texts[#texts + 1] = part[1] end
      end
    end
  end
end
return table.concat(texts)
"""


class Neovim:
    """One window; `configuration` is its init.lua."""

    def __init__(
        self,
        program: str,
        home: Path,
        file: Path,
        configuration: str,
        variables: dict[str, str] | None = None,
    ) -> None:
        self._program = program
        self._socket = str(home / f"nvim-{os.urandom(3).hex()}.sock")
        config = home / "init.lua"
        config.write_text(configuration)
        self.process = subprocess.Popen(
            [program, "--headless", "-u", str(config), "--listen", self._socket, str(file)],
            env=environment(home) | (variables or {}),
            cwd=file.parent,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: os.path.exists(self._socket))

    def type(self, keys: str) -> None:
        self._remote("--remote-send", keys)

    def lua(self, code: str) -> Any:
        quoted = " ".join(code.replace("'", "''").split())
        return json.loads(
            self._remote("--remote-expr", f"json_encode(luaeval('(function() {quoted} end)()'))")
        )

    def ghost(self) -> str:
        """Ghost text of the current buffer, line breaks included."""
        return str(self.lua(GHOST))

    def line(self, number: int) -> str:
        return str(self.lua(f"return vim.fn.getline({number})"))

    def text(self) -> str:
        return str(self.lua("return table.concat(vim.fn.getline(1, '$'), string.char(10))"))

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
    """Wait for something to be so.

    Raises:
        AssertionError: it was not, for so long.
    """
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
