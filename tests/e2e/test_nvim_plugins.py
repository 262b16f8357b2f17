"""editors/nvim under plugin managers and beside completion menus, in a real Neovim.

ALBOR_NVIM_PLUGINS names a folder that holds the sources of lazy.nvim, mini.nvim, blink.cmp and
nvim-cmp, a folder each; without it these tests are skipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.neovim import Neovim, until
from tests.e2e.stack import CODE, ROOT, editor

pytestmark = pytest.mark.e2e

PLUGIN = ROOT / "editors" / "nvim"
Open = Callable[[str, str], Neovim]


def source(name: str) -> Path:
    """Where a plugin's source is; skips without it."""
    path = Path(os.environ.get("ALBOR_NVIM_PLUGINS", "/nonexistent")) / name
    if not path.is_dir():
        pytest.skip(f"no {name}: name the folder of the plugins in ALBOR_NVIM_PLUGINS")
    return path


@pytest.fixture
def open_window(tmp_path: Path) -> Iterator[Open]:
    windows: list[Neovim] = []
    project = tmp_path / "project"
    project.mkdir()
    (project / "stats.py").write_text(CODE)

    def open_one(needs: str, configuration: str) -> Neovim:
        configuration = configuration.format(source=source(needs), albor=PLUGIN)
        program = editor("nvim", "ALBOR_NVIM")
        window = Neovim(program, tmp_path, project / "stats.py", configuration)
        windows.append(window)
        until(lambda: window.lua("return require('albor').status.state") == "ready", 60)
        return window

    yield open_one
    for window in windows:
        window.close()


def suggests(window: Neovim) -> str:
    """Type at the end of line 6 until there is ghost text; that text."""
    window.type("6GAso")
    until(lambda: window.ghost())
    time.sleep(0.5)
    return window.ghost()


def is_taken_with_tab(window: Neovim) -> None:
    first = suggests(window).partition("\n")[0]
    window.type("<Tab>")
    until(lambda: window.line(6) == f"    ordered = so{first}", 5)


def test_lazy_nvim(open_window: Open) -> None:
    is_taken_with_tab(
        open_window(
            "lazy.nvim",
            "vim.opt.runtimepath:prepend('{source}')\n"
            "require('lazy').setup({{ {{ dir = '{albor}', opts = {{}} }} }})\n",
        )
    )


def test_mini_deps(open_window: Open, tmp_path: Path) -> None:
    folder = tmp_path / ".local/share/nvim/site/pack/deps/opt"
    folder.mkdir(parents=True)
    (folder / "albor").symlink_to(PLUGIN, target_is_directory=True)
    is_taken_with_tab(
        open_window(
            "mini.nvim",
            "vim.opt.runtimepath:prepend('{source}')\n"
            "require('mini.deps').setup()\n"
            "MiniDeps.add('albor')\n"
            "require('albor').setup()\n",
        )
    )


BLINK = """
vim.opt.runtimepath:prepend('{source}')
vim.opt.runtimepath:prepend('{albor}')
vim.o.swapfile = false
require('blink.cmp').setup({{
  keymap = {{ preset = 'super-tab' }},
  fuzzy = {{ implementation = 'lua' }},
  sources = {{ default = {{ 'buffer' }} }},
}})
require('albor').setup({{ ghost = 'own' }})
"""
CMP = """
vim.opt.runtimepath:prepend('{source}')
vim.opt.runtimepath:prepend('{albor}')
vim.o.swapfile = false
vim.cmd('runtime! plugin/cmp.lua')
local cmp = require('cmp')
cmp.register_source('words', {{
  complete = function(_, _, done) done({{ {{ label = 'somewhere' }}, {{ label = 'sorrow' }} }}) end,
}})
cmp.setup({{
  sources = {{ {{ name = 'words' }} }},
  mapping = {{ ['<Tab>'] = function(fallback)
    if cmp.visible() then cmp.confirm({{ select = true }}) else fallback() end
  end }},
}})
require('albor').setup({{ ghost = 'own' }})
"""


@pytest.mark.parametrize(
    ("name", "configuration", "menu", "visible", "show", "close"),
    [
        ("blink.cmp", BLINK, "blink.cmp", "is_visible", "show", "hide"),
        ("nvim-cmp", CMP, "cmp", "visible", "complete", "close"),
    ],
)
def test_beside_a_menu(
    open_window: Open,
    name: str,
    configuration: str,
    menu: str,
    visible: str,
    show: str,
    close: str,
) -> None:
    window = open_window(name, configuration)
    # A word that the menu has, and blink.cmp finds in the buffer.
    window.type("Gosomewhere = 1<C-\\><C-n>")
    first = suggests(window)
    is_visible = f"return require('{menu}').{visible}() == true"
    window.lua(f"require('{menu}').{show}() return 1")
    until(lambda: window.lua(is_visible), 10)
    window.type("<M-w>")
    word = first.split("(")[0]
    until(lambda: window.line(6) == f"    ordered = so{word}", 5)
    window.lua(f"require('{menu}').{close}() return 1")
    until(lambda: not window.lua(is_visible), 5)
    until(lambda: window.ghost(), 10)
    rest = window.ghost().partition("\n")[0]
    window.type("<Tab>")
    until(lambda: window.line(6) == f"    ordered = so{word}{rest}", 5)
