"""Finding, starting, sharing and ending a server. Real processes, a server that is quick."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from albor_lsp import supervisor
from albor_lsp.errors import LspError, ServerDownError
from albor_lsp.http import Address
from albor_lsp.launcher import Launcher, run_folder, server_program
from albor_lsp.service import Service
from albor_lsp.settings import Settings

from tests.lsp.fakes import until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs unix sockets")

PROGRAM = """
import asyncio, json, os, sys
path = sys.argv[sys.argv.index("--uds") + 1]
open(os.environ["STARTS"], "a").write(f"{os.getpid()}\\n")
async def talk(reader, writer):
    while await reader.readuntil(b"\\r\\n\\r\\n"):
        data = json.dumps({"data": [{"id": "m", "owned_by": "albor"}]}).encode()
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(data) + data)
async def main():
    async with await asyncio.start_unix_server(talk, path) as server:
        await server.serve_forever()
asyncio.run(main())
"""


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    monkeypatch.delenv("ALBOR_SERVER_URL", raising=False)
    monkeypatch.setattr(supervisor, "GRACE_S", 0.3)
    program = tmp_path / "serve.py"
    program.write_text(PROGRAM)
    return (sys.executable, str(program))


def starts(tmp_path: Path) -> list[int]:
    path = tmp_path / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone, or going while it is read
        return False
    return state != "Z"


def test_windows_share_one_server_that_ends_with_the_last(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    async def main() -> None:
        settings = Settings(server_command=command)
        one, two = Launcher(), Launcher()
        told: list[str] = []
        try:
            first, second = await asyncio.gather(
                one.find(settings, told.append), two.find(settings, told.append)
            )
            assert first == second
            assert first.socket_path is not None
            (pid,) = starts(tmp_path)
            service = Service(lambda: one.find(settings, told.append))
            service.start()
            await until(lambda: service.is_ready)
            assert service.model == "m"
            await service.close()
            one.close()
            await asyncio.sleep(supervisor.GRACE_S + 4)
            assert is_alive(pid)
        finally:
            one.close()
            two.close()
        await until(lambda: not is_alive(pid), 15)
        assert starts(tmp_path) == [pid]

    run(main())


def test_a_server_that_was_killed_is_started_again(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    async def main() -> None:
        settings = Settings(server_command=command)
        launcher = Launcher()
        try:
            await launcher.find(settings, lambda _text: None)
            (pid,) = starts(tmp_path)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not is_alive(pid))
            await asyncio.sleep(0.6)  # its supervisor sees it
            await launcher.find(settings, lambda _text: None)
            assert len(starts(tmp_path)) == 2
        finally:
            launcher.close()
        await until(lambda: not any(map(is_alive, starts(tmp_path))), 15)

    run(main())


def test_a_server_that_cannot_start_says_why_and_is_not_tried_at_once(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    async def main() -> None:
        program = tmp_path / "broken.py"
        program.write_text(
            "import sys; print('model.gguf is not a model', file=sys.stderr); sys.exit(2)"
        )
        settings = Settings(server_command=(sys.executable, str(program)))
        launcher = Launcher()
        try:
            with pytest.raises(ServerDownError, match=r"model\.gguf is not a model"):
                await launcher.find(settings, lambda _text: None)
            started = time.monotonic()
            with pytest.raises(ServerDownError, match="did not start"):
                await launcher.find(settings, lambda _text: None)
            assert time.monotonic() - started < 1
        finally:
            launcher.close()

    run(main())


def test_a_server_that_listens_and_then_ends_has_not_started(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    async def main() -> None:
        program = tmp_path / "brief.py"
        program.write_text(
            "import socket, sys, time\n"
            "listening = socket.socket(socket.AF_UNIX)\n"
            "listening.bind(sys.argv[sys.argv.index('--uds') + 1])\n"
            "listening.listen()\n"
            "time.sleep(0.4)\n"
            "sys.exit('there is no model at model.gguf')\n"
        )
        settings = Settings(server_command=(sys.executable, str(program)))
        launcher = Launcher()
        try:
            with pytest.raises(ServerDownError, match=r"no model at model\.gguf"):
                await launcher.find(settings, lambda _text: None)
        finally:
            launcher.close()

    run(main())


def test_a_named_server_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        launcher = Launcher()
        monkeypatch.setenv("ALBOR_SERVER_URL", "http://there:1")
        assert await launcher.find(Settings(), print) == Address("there", 1)
        assert await launcher.find(Settings(server_url="http://here:2"), print) == Address(
            "here", 2
        )

    run(main())


def test_nothing_is_started_where_that_is_not_wanted(command: tuple[str, ...]) -> None:
    async def main() -> None:
        settings = Settings(start_server=False, server_command=command)
        with pytest.raises(LspError, match="start albor-serve"):
            await Launcher().find(settings, print)

    run(main())


def test_a_program_that_is_missing() -> None:
    with pytest.raises(ServerDownError, match="pip install albor"):
        server_program(("no-such-program-anywhere",))
    with pytest.raises(ServerDownError, match="empty"):
        server_program(())


def test_the_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run_folder().stat().st_mode & 0o777 == 0o700


def test_the_opened_project_lends_the_server_no_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Editors start language servers in the project's folder.
    monkeypatch.setattr("albor_lsp.launcher.shutil.which", lambda *_args, **_kwargs: None)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "numbers.py").write_text("open('ran', 'w').close(); raise SystemExit(3)")
    program = server_program(("albor-serve",))
    code = "import numbers, sys; print(numbers.__file__)"
    program[program.index("-c") + 1] = code
    result = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert not (tmp_path / "ran").exists()
    assert result.returncode == 0, result.stderr
