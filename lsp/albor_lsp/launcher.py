"""Finding a completion server: one that is named, one that runs, or one that is started."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from albor_lsp.errors import LspError, ServerDownError
from albor_lsp.http import Address, HttpClient, parse_address
from albor_lsp.settings import Settings
from albor_lsp.supervisor import is_free, run_files

__all__ = ["Launcher", "run_folder", "server_program"]

DEFAULT_PORT: Final = 8080
LOOK_S: Final = 0.5
START_S: Final = 120.0
POLL_S: Final = 0.05
RETRY_S: Final = (5.0, 15.0, 60.0)
"""A server that ended at once is started again after so long."""


class Launcher:
    """Knows where the server is. `close` gives up the share in a server that was started."""

    def __init__(self) -> None:
        self._share: IO[str] | None = None
        self._share_name = ""
        self._num_failed = 0
        self._failed_at = 0.0
        self._failure = ""

    async def find(self, settings: Settings, tell: Callable[[str], None]) -> Address:
        """The address of the server to use; `tell` gets a line when one is started.

        Raises:
            LspError: there is none, with a remedy.
        """
        url = settings.server_url or os.environ.get("ALBOR_SERVER_URL", "")
        if url:
            return parse_address(url)
        name = _name_of(settings.server_command)
        files = run_files(run_folder(), name)
        address = Address(socket_path=str(files["socket"]))
        if self._share is not None and self._share_name == name and _answers(files["socket"]):
            return address
        usual = Address(port=DEFAULT_PORT)
        if settings.server_command == Settings().server_command and await _is_albor(usual):
            return usual
        if not settings.start_server:
            raise ServerDownError(
                "no server runs on this machine: start albor-serve, or name one with serverUrl"
            )
        if sys.platform == "win32":
            raise ServerDownError("no server runs on this machine: start albor-serve")
        self._take_share(files["clients"], name)
        if not _answers(files["socket"]):
            await self._start(settings.server_command, name, files, tell)
        return address

    def close(self) -> None:
        """Give up the share: the server ends soon unless another window uses it."""
        share, self._share = self._share, None
        if share is not None:
            share.close()

    def _take_share(self, clients: Path, name: str) -> None:
        """Hold the lock that keeps a started server running. Before looking whether it runs."""
        import fcntl

        if self._share is not None and self._share_name == name:
            return
        self.close()
        self._share = clients.open("a+")
        self._share_name = name
        fcntl.flock(self._share, fcntl.LOCK_SH)

    async def _start(
        self,
        command: tuple[str, ...],
        name: str,
        files: dict[str, Path],
        tell: Callable[[str], None],
    ) -> None:
        pause = RETRY_S[min(self._num_failed, len(RETRY_S)) - 1] if self._num_failed else 0.0
        if time.monotonic() - self._failed_at < pause:
            raise ServerDownError(self._failure)
        program = server_program(command)
        tell(f"starting {command[0]}")
        supervisor = [sys.executable, "-I", str(Path(__file__).with_name("supervisor.py"))]
        process = subprocess.Popen(  # noqa: S603 - the person's own command
            [*supervisor, str(run_folder()), name, *program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            await asyncio.sleep(POLL_S / 5)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if _answers(files["socket"]) and await _speaks(files["socket"]):
                self._num_failed = 0
                return
            if is_free(files["server"]):
                break
            await asyncio.sleep(POLL_S)
        self._num_failed += 1
        self._failed_at = time.monotonic()
        self._failure = f"{command[0]} did not start: {_last_line(files['log'])}"
        raise ServerDownError(self._failure)


def run_folder() -> Path:
    """Where sockets and locks are, for this user alone; made where it is missing.

    Raises:
        ServerDownError: it can't be made.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        folder = Path(base) / "albor"
    else:
        folder = Path(tempfile.gettempdir()) / f"albor-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.is_symlink():
            raise ServerDownError(f"{folder} belongs to another user: set XDG_RUNTIME_DIR")
    except OSError as error:
        raise ServerDownError(f"{folder} can't be used: {error.strerror}") from error
    return folder


def server_program(command: tuple[str, ...]) -> list[str]:
    """The command with its program's path.

    A plain `albor-serve` is also looked for beside this Python and in it.

    Raises:
        ServerDownError: it is not installed.
    """
    if not command:
        raise ServerDownError("serverCommand is empty: it must name a program")
    name, *arguments = command
    found = shutil.which(Path(name).expanduser())
    if found is None and "/" not in name:
        found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is not None:
        return [found, *arguments]
    if name == "albor-serve" and importlib.util.find_spec("albor_serve") is not None:
        start = "import sys; from albor_serve.cli import main; sys.exit(main())"
        # -P: the current folder is the opened project, whose modules must not be imported.
        return [sys.executable, "-P", "-c", start, *arguments]
    raise ServerDownError(f"{name} is not installed: pip install albor, or set serverCommand")


def _name_of(command: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(command).encode("utf-8", "replace")).hexdigest()[:10]


def _answers(path: Path) -> bool:
    """Whether a server listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(LOOK_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


async def _speaks(path: Path) -> bool:
    """Whether what listens there lives to answer: a server that has no model listens, then ends."""
    client = HttpClient(Address(socket_path=str(path)))
    try:
        await client.get("/v1/models", timeout_s=LOOK_S)
    except ServerDownError:
        return False
    except LspError:
        return True
    finally:
        await client.close()
    return True


async def _is_albor(address: Address) -> bool:
    client = HttpClient(address)
    try:
        answer = await client.get("/v1/models", timeout_s=LOOK_S)
    except LspError:
        return False
    finally:
        await client.close()
    models = answer.get("data") if isinstance(answer, dict) else None
    return bool(models) and isinstance(models, list) and models[0].get("owned_by") == "albor"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:200] if lines else "it ended without a word"
