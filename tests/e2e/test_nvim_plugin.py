"""editors/nvim in real Neovims, old and new, with the real servers and model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.e2e.neovim import Neovim, until
from tests.e2e.stack import CODE, editor

pytestmark = pytest.mark.e2e

PLUGIN = Path(__file__).resolve().parents[2] / "editors" / "nvim"
OLD, NEW = "ALBOR_NVIM_OLD", "ALBOR_NVIM"

Open = Callable[..., Neovim]


def processes(home: Path) -> list[int]:
    """Every process that was started under this home."""
    mark = f"HOME={home}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def servers(home: Path) -> list[int]:
    """The completion servers among them, not what watches over them."""
    found = []
    for pid in processes(home):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--uds" in words:
            found.append(pid)
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    (project / "stats.py").write_text(CODE)
    return tmp_path


@pytest.fixture
def open_window(home: Path) -> Iterator[Open]:
    windows: list[Neovim] = []

    def open_one(
        setup: str = "{}",
        *,
        variable: str = NEW,
        before: str = "",
        file: str = "stats.py",
        variables: dict[str, str] | None = None,
    ) -> Neovim:
        configuration = (
            f"{before}\nvim.opt.runtimepath:prepend('{PLUGIN}')\n"
            f"{f'require([[albor]]).setup({setup})' if setup else ''}\n"
        )
        program = editor("nvim", variable)
        path = home / "project" / file
        windows.append(Neovim(program, home, path, configuration, variables))
        return windows[-1]

    yield open_one
    for window in windows:
        window.close()


def ready(window: Neovim) -> Neovim:
    until(lambda: window.lua("return require('albor').status.state") == "ready", 60)
    return window


def shown(window: Neovim, keys: str) -> str:
    window.type(keys)
    until(lambda: window.ghost())
    time.sleep(0.5)
    return window.ghost()


WAYS = [(NEW, "builtin"), (NEW, "own"), (OLD, "auto")]


@pytest.mark.parametrize(("variable", "ghost"), WAYS)
def test_a_suggestion_is_typed_through_taken_in_pieces_and_undone(
    open_window: Open, variable: str, ghost: str
) -> None:
    window = ready(open_window(f"{{ ghost = '{ghost}' }}", variable=variable))
    first = shown(window, "6GAso")
    assert first.startswith("rted(")
    window.type(first[:2])
    until(lambda: window.ghost() == first[2:], 3)
    window.type("<M-w>")
    until(lambda: window.line(6).endswith("ordered = sorted"), 3)
    until(lambda: window.ghost() == first[4:], 3)
    window.type("<M-l>")
    whole = f"    ordered = so{first}".partition("\n")[0]
    until(lambda: window.line(6) == whole, 3)
    window.type("<C-\\><C-n>u")
    until(lambda: window.line(6) == "    ordered = sorted", 3)

    rest = shown(window, "6GA")
    before = window.text()
    window.type("<Tab>")
    until(lambda: f"sorted{rest}" in window.text(), 3)
    window.type("<C-\\><C-n>u")
    until(lambda: window.text() == before, 3)


@pytest.mark.parametrize(("variable", "ghost"), WAYS)
def test_escape_and_dismissing_take_it_away(open_window: Open, variable: str, ghost: str) -> None:
    window = ready(open_window(f"{{ ghost = '{ghost}' }}", variable=variable))
    shown(window, "6GAso")
    window.type("<M-e>")
    until(lambda: not window.ghost(), 3)
    assert window.line(6) == "    ordered = so"
    shown(window, "<M-\\>")
    window.type("<C-\\><C-n>")
    until(lambda: not window.ghost(), 3)


def test_other_suggestions_come_by_key(open_window: Open) -> None:
    window = ready(open_window("{ ghost = 'own', settings = { minConfidence = 0 } }"))
    first = shown(window, "6GA")
    window.type("<M-n>")
    until(lambda: window.ghost() not in ("", first), 10)
    window.type("<M-p>")
    until(lambda: window.ghost() == first, 10)


@pytest.mark.parametrize(
    ("mapping", "typed"),
    [
        ("", "\t"),
        ("vim.keymap.set('i', '<Tab>', 'plain')", "plain"),
        ("vim.keymap.set('i', '<Tab>', function() return 'call' end, {expr = true})", "call"),
        (
            "vim.cmd('inoremap <Plug>(x) plug| imap <Tab> <Plug>(x)')",
            "plug",
        ),
    ],
)
def test_tab_is_what_it_was_where_nothing_is_shown(
    open_window: Open, mapping: str, typed: str
) -> None:
    window = open_window(before=f"vim.cmd('filetype indent off')\n{mapping}", file="new.txt")
    window.type("i<Tab>")
    until(lambda: window.line(1).replace("    ", "\t") == typed.replace("    ", "\t"), 5)


def test_keys_can_be_others_or_none(open_window: Open) -> None:
    window = open_window("{ keys = { accept = '<C-l>', next = false } }")
    mapped = "return vim.fn.maparg('{}', 'i', false, true).desc or ''"
    assert window.lua(mapped.format("<C-l>")) == "albor: accept"
    assert window.lua(mapped.format("<M-n>")) == ""
    assert window.lua(mapped.format("<Tab>")) != "albor: accept"
    window.lua("require('albor').setup({ keys = false }) return 1")
    assert window.lua(mapped.format("<C-l>")) == ""


def test_every_command_does_what_help_says(open_window: Open) -> None:
    window = ready(open_window("{ ghost = 'own' }"))
    shown(window, "6GAso")
    window.type("<C-\\><C-n>")
    said = "return vim.fn.execute('{}')"
    assert "ready | albor-33m" in window.lua(said.format("Albor status"))
    assert "ready | albor-33m" in window.lua(said.format("Albor"))
    assert "no command" in window.lua(said.format("silent! Albor nonsense"))
    for command, text in {
        "explain": "# The last suggestion",
        "stats": "shown",
        "log": "server",
    }.items():
        window.type(f":Albor {command}<CR>")
        until(lambda text=text: text in window.text(), 5)
        window.type(":close<CR>")
    window.type(":Albor toggle<CR>")
    until(lambda: window.lua("return require('albor').status.state") == "paused", 5)
    window.type(":Albor toggle<CR>")
    until(lambda: window.lua("return require('albor').status.state") == "ready", 5)
    window.type(":Albor stop<CR>")
    until(lambda: not window.lua("return #vim.lsp.get_clients({name = 'albor'}) > 0"), 10)
    window.type(":Albor start<CR>")
    ready(window)
    assert shown(window, "6GA")


def test_health_and_help_are_complete(open_window: Open, tmp_path: Path) -> None:
    window = ready(open_window())
    window.type(":checkhealth albor<CR>")
    until(lambda: "language server:" in window.text(), 10)
    assert "ERROR" not in window.text()
    page = (PLUGIN / "doc" / "albor.txt").read_text()
    names = window.lua("return require('albor').names()")
    assert all(f":Albor {name} " in page for name in names)
    assert set(re.findall(r"^:Albor (\w+)", page, re.MULTILINE)) == set(names)
    defaults = window.lua("return require('albor').defaults")
    for name in [*defaults, *defaults["keys"], "filetypes"]:
        assert re.search(rf"\b{name} = ", page), name
    tags = subprocess.run(
        [editor("nvim", NEW), "--headless", "-u", "NONE", "-c",
         f"helptags {PLUGIN}/doc", "-c", "qa"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (PLUGIN / "doc" / "tags").unlink()
    assert not tags.stderr.strip()


@pytest.mark.parametrize(("variable", "ghost"), WAYS)
def test_the_server_dies_and_comes_back(
    open_window: Open, home: Path, variable: str, ghost: str
) -> None:
    window = ready(open_window(f"{{ ghost = '{ghost}' }}", variable=variable))
    shown(window, "6GAso")
    window.type("<C-\\><C-n>u")
    [server] = servers(home)
    os.kill(server, signal.SIGKILL)
    window.type("6GAso<C-\\><C-n>u")  # the death is noticed by the next question
    until(lambda: servers(home) not in ([], [server]), 60)
    ready(window)
    window.type("6GAs")
    window.type("o")
    until(lambda: window.ghost(), 30)


def test_two_windows_share_a_server_and_leave_nothing(open_window: Open, home: Path) -> None:
    one, two = ready(open_window()), ready(open_window(file="other.py"))
    assert shown(one, "6GAso")
    two.type("idef mean(values):<CR>    return s")
    until(lambda: two.ghost(), 30)
    assert len(servers(home)) == 1
    one.close()
    two.type("u")
    assert len(servers(home)) == 1
    two.close()
    until(lambda: not processes(home), 30)


def test_without_a_language_server_the_editor_is_quiet(open_window: Open) -> None:
    window = open_window("{ cmd = { 'no-such-program' } }")
    window.type("6GAsorted<C-\\><C-n>")
    until(lambda: window.line(6) == "    ordered = sorted")
    assert "no-such-program" not in window.lua("return vim.fn.execute('messages')")
    status = window.lua("return vim.fn.execute('Albor status')")
    assert "no-such-program is not on the PATH: install albor" in status


def test_a_wrong_port_is_told_by_the_status_alone(open_window: Open) -> None:
    window = open_window("{ settings = { serverUrl = 'http://127.0.0.1:9' } }")
    until(lambda: window.lua("return require('albor').status.state") == "offline")
    window.type("6GAso<C-\\><C-n>")
    until(lambda: window.line(6) == "    ordered = so")
    status = window.lua("return vim.fn.execute('Albor status')")
    assert "offline" in status
    assert "127.0.0.1:9" in status


def test_a_port_that_another_program_has_is_told_by_the_status(open_window: Open) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as busy:
        Thread(target=busy.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{busy.server_port}"
        window = open_window(f"{{ settings = {{ serverUrl = 'http://{address}' }} }}")
        until(lambda: "no completion server" in window.lua("return require('albor').summary()"))
        assert address in window.lua("return require('albor').summary()")
        window.type("6GAso<C-\\><C-n>")
        until(lambda: window.line(6) == "    ordered = so", 5)
        busy.shutdown()


def test_a_language_server_without_its_python_is_told_by_the_status(
    open_window: Open, home: Path
) -> None:
    program = home / "broken"
    program.write_text("#!/no/such/python\n")
    program.chmod(0o755)
    window = open_window(f"{{ cmd = {{ '{program}' }} }}")
    window.type("6GAso<C-\\><C-n>")
    until(lambda: window.line(6) == "    ordered = so", 5)
    assert "not running" in window.lua("return require('albor').summary()")
    program.write_text("#!/bin/sh\nexit 127\n")
    window.type(":silent! Albor start<CR>")
    until(lambda: "ended with code 127" in window.lua("return require('albor').summary()"), 10)


def test_without_a_model_the_status_names_it(open_window: Open) -> None:
    window = open_window("{ settings = { serverCommand = {'albor-serve', '/no/model.gguf'} } }")
    until(lambda: "/no/model.gguf" in window.lua("return require('albor').summary()"), 60)
    assert window.lua("return require('albor').status.state") != "ready"
    window.type("6GAso<C-\\><C-n>")
    until(lambda: window.line(6) == "    ordered = so", 5)


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        (b"x = 1\n" * 9_000_000, "", "more than max_bytes"),
        (b"\0\1\2" * 100, "vim.o.binary = true", "binary"),
        (b"text\n", "vim.o.filetype = 'gitcommit'", "in exclude"),
    ],
    ids=["54 MB", "binary", "excluded"],
)
def test_some_buffers_get_none(
    open_window: Open, home: Path, content: bytes, options: str, reason: str
) -> None:
    (home / "project" / "odd.py").write_bytes(content)
    window = open_window(file="odd.py")
    if options:
        window.lua(f"{options} return 1")
    wanted = "local yes, why = require('albor').wants(0) return {yes, why}"
    until(lambda: window.lua(wanted)[0] is False, 20)
    assert reason in window.lua(wanted)[1]


def test_a_read_only_folder_does_no_harm(open_window: Open, home: Path) -> None:
    (home / "project").chmod(0o555)
    try:
        assert shown(ready(open_window()), "6GAso")
    finally:
        (home / "project").chmod(0o755)


def test_as_a_plain_package_it_needs_no_setup(open_window: Open, home: Path) -> None:
    window = ready(open_window(""))
    assert shown(window, "6GAso")


def test_file_types_and_the_time_before_asking_can_be_set(open_window: Open) -> None:
    window = open_window("{ filetypes = { 'lua' }, ghost = 'own' }")
    window.type("6GAso")
    time.sleep(2)
    assert not window.lua("return #vim.lsp.get_clients({name = 'albor'}) > 0")
    assert window.ghost() == ""

    slow = ready(open_window("{ filetypes = { 'python' }, ghost = 'own', debounce_ms = 1500 }"))
    slow.type("6GAso")
    began = time.monotonic()
    until(lambda: slow.ghost(), 20)
    assert time.monotonic() - began > 1.0
