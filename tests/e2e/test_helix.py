"""editors/helix in a real Helix, with the real servers and model; Helix runs inside tmux."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import CODE, editor, environment
from tests.e2e.test_nvim_plugin import servers

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


class Helix:
    """A Helix on a screen of its own."""

    def __init__(self, program: str, home: Path, file: Path, languages: str = "") -> None:
        self._name = f"albor-{uuid.uuid4().hex[:8]}"
        config = home / ".config" / "helix"
        config.mkdir(parents=True, exist_ok=True)
        written = languages or (ROOT / "editors/helix/languages.toml").read_text()
        (config / "languages.toml").write_text(written)
        self._env = environment(home)
        self._tmux("new-session", "-d", "-x", "110", "-y", "24", "-c", str(file.parent), program,
                   str(file))  # fmt: skip

    def type(self, *keys: str) -> None:
        for key in keys:
            self._tmux("send-keys", key)
            time.sleep(0.3)

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.screen():
            assert time.monotonic() < end, self.screen()
            time.sleep(0.1)

    def close(self) -> None:
        subprocess.run(["tmux", "-L", self._name, "kill-server"], capture_output=True)

    def _tmux(self, *arguments: str) -> str:
        return subprocess.run(
            ["tmux", "-L", self._name, *arguments],
            env=self._env, capture_output=True, text=True, check=True, timeout=10,
        ).stdout  # fmt: skip


@pytest.fixture
def helix(tmp_path: Path) -> Iterator[tuple[Helix, Path]]:
    program = editor("hx", "ALBOR_HELIX")
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    file = tmp_path / "project" / "stats.py"
    file.parent.mkdir()
    file.write_text(CODE)
    running = Helix(program, tmp_path, file)
    yield running, file
    running.close()


def offered(running: Helix) -> None:
    """Type at the end of line 6 until the menu holds the suggestion."""
    running.wait_for("def median")
    running.type("6GA")
    end = time.monotonic() + 40
    while "sorted(values" not in running.screen():
        # The first keys may come before the server is up.
        assert time.monotonic() < end, running.screen()
        running.type("so")
        time.sleep(1.0)
        if "sorted(values" not in running.screen():
            running.type("BSpace", "BSpace")


def written(running: Helix, file: Path, text: str) -> None:
    """Save, and wait until the file holds the text."""
    running.type("Escape", ":w", "Enter")
    end = time.monotonic() + 10
    while text not in file.read_text():
        assert time.monotonic() < end, running.screen()
        time.sleep(0.1)


def test_one_undo_takes_it_back_and_the_server_may_die(
    helix: tuple[Helix, Path], tmp_path: Path
) -> None:
    running, file = helix
    offered(running)
    running.type("Tab", "Enter")
    written(running, file, "ordered = sorted(values")
    running.type("u")
    written(running, file, "    ordered = so\n")
    running.type("u")
    written(running, file, CODE)

    (pid,) = servers(tmp_path)
    os.kill(pid, signal.SIGKILL)
    offered(running)
    running.type("Tab", "Enter")
    written(running, file, "ordered = sorted(values")


def test_two_windows_share_a_server_and_leave_nothing(
    helix: tuple[Helix, Path], tmp_path: Path
) -> None:
    running, file = helix
    offered(running)
    other = file.with_name("other.py")
    other.write_text(CODE)
    second = Helix(editor("hx", "ALBOR_HELIX"), tmp_path, other)
    try:
        offered(second)
        assert len(servers(tmp_path)) == 1
        second.type("Tab", "Enter")
        written(second, other, "ordered = sorted(values")
        second.type(":q", "Enter")
        assert len(servers(tmp_path)) == 1
    finally:
        second.close()
    running.type("Escape", ":q!", "Enter")
    end = time.monotonic() + 30
    while left := servers(tmp_path):
        assert time.monotonic() < end, left
        time.sleep(0.2)


def test_the_menu_offers_the_suggestion_and_takes_it_over(helix: tuple[Helix, Path]) -> None:
    running, file = helix
    offered(running)
    running.type("Tab", "Enter", "Escape", ":wq", "Enter")
    end = time.monotonic() + 10
    while "ordered = sorted(values" not in file.read_text():
        assert time.monotonic() < end, running.screen()
        time.sleep(0.1)
    assert file.read_text().startswith("def mean(values):")


@pytest.mark.parametrize(
    ("command", "url"),
    [("no-such-program", ""), ("albor-lsp", "http://127.0.0.1:9")],
    ids=["no language server", "wrong port"],
)
def test_without_its_servers_helix_stays_usable(tmp_path: Path, command: str, url: str) -> None:
    program = editor("hx", "ALBOR_HELIX")
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    file = tmp_path / "project" / "stats.py"
    file.parent.mkdir()
    file.write_text(CODE)
    languages = (ROOT / "editors/helix/languages.toml").read_text()
    languages = languages.replace('"albor-lsp"', f'"{command}"')
    languages += f'\n[language-server.albor.environment]\nALBOR_SERVER_URL = "{url}"\n'
    running = Helix(program, tmp_path, file, languages)
    try:
        running.wait_for("def median")
        running.type("6GA", "so", "C-x", "Escape", ":wq", "Enter")
        end = time.monotonic() + 10
        while "    ordered = so\n" not in file.read_text():
            assert time.monotonic() < end, running.screen()
            time.sleep(0.1)
    finally:
        running.close()


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("huge.py", b"x = 1  # one of very many lines\n" * 1_700_000, "one of very many"),
        ("data.py", bytes(range(256)) * 64, "data.py"),
    ],
    ids=["50 MB", "binary"],
)
def test_files_that_nobody_completes_can_be_edited(
    tmp_path: Path, name: str, content: bytes, shown: str
) -> None:
    program = editor("hx", "ALBOR_HELIX")
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    file = tmp_path / "project" / name
    file.parent.mkdir()
    file.write_bytes(content)
    running = Helix(program, tmp_path, file)
    try:
        running.wait_for(shown)
        running.type("i")
        running.wait_for("INS")
        running.type("Q", "Z", "Escape")
        running.wait_for("QZ")
        running.type(":q!", "Enter")
    finally:
        running.close()
    assert file.read_bytes() == content


def test_a_folder_that_cant_be_written_to(tmp_path: Path) -> None:
    program = editor("hx", "ALBOR_HELIX")
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    file = tmp_path / "project" / "stats.py"
    file.parent.mkdir()
    file.write_text(CODE)
    file.chmod(0o444)
    file.parent.chmod(0o555)
    running = Helix(program, tmp_path, file)
    try:
        running.wait_for("def median")
        running.type("6GA", "so", "C-x", "Escape")
        running.wait_for("ordered = so")
    finally:
        running.close()
        file.parent.chmod(0o755)
