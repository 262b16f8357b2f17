"""The plugin llama.vim, in a real Vim on a terminal, against the real server.

ALBOR_LLAMA_VIM names a folder with the plugin (`git clone https://github.com/ggml-org/llama.vim`).
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli import Server

PLUGIN = os.environ.get("ALBOR_LLAMA_VIM")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not PLUGIN, reason="needs llama.vim: set ALBOR_LLAMA_VIM to its folder"),
    pytest.mark.skipif(shutil.which("vim") is None, reason="needs Vim: apt-get install vim"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl: apt-get install curl"),
]

CODE = """\
def mean(values):
    return sum(values) / len(values)


def print_mean(values):
    print(mean(

print_mean([1, 2, 3])
"""
CURSOR_LINE = 6
SUGGESTION_S = 15.0


class Vim:
    """Vim on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.screen = b""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execvp("vim", ["vim", *arguments])

    def keys(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def read(self, seconds: float) -> None:
        """Collect what Vim draws; it stops while nobody reads."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([self._terminal], [], [], left)
            try:
                self.screen += os.read(self._terminal, 65536) if ready else b""
            except OSError:  # Vim has ended
                return

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._terminal)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop(signal.SIGTERM)


@pytest.fixture
def vim(server: Server, tmp_path: Path) -> Iterator[Vim]:
    (tmp_path / "mean.py").write_text(CODE)
    settings = tmp_path / "vimrc"
    settings.write_text(
        f"set nocompatible noswapfile runtimepath^={PLUGIN}\n"
        f"let g:llama_config = {{'endpoint_fim': '{server.url}/infill'}}\n"
        f"autocmd User Shown call writefile([''], '{tmp_path / 'shown'}')\n"
        "call timer_start(50, {-> llama#is_fim_hint_shown()"
        " ? execute('doautocmd User Shown') : 0}, {'repeat': -1})\n"
    )
    running = Vim("-u", str(settings), str(tmp_path / "mean.py"))
    yield running
    running.close()


def test_a_suggestion_is_shown_and_tab_accepts_it(vim: Vim, tmp_path: Path) -> None:
    vim.read(1.0)
    vim.keys(f"{CURSOR_LINE}GA")
    end = time.monotonic() + SUGGESTION_S
    while not (tmp_path / "shown").exists() and time.monotonic() < end:
        vim.read(0.1)
    assert (tmp_path / "shown").exists(), vim.screen[-500:]
    vim.keys("\t")
    vim.read(0.5)
    vim.keys("\x1b:wq\r")
    vim.read(1.5)
    assert b"FIM job failed" not in vim.screen
    line = (tmp_path / "mean.py").read_text().splitlines()[CURSOR_LINE - 1]
    assert line.startswith("    print(mean(values)"), line
