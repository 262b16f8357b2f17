"""The albor-lsp command."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

from albor_lsp import __version__
from albor_lsp.command import Parser, exit_code
from albor_lsp.errors import SettingsError
from albor_lsp.rpc import FramingError, Peer
from albor_lsp.server import LanguageServer

__all__ = ["main"]

READ_BYTES: Final = 1 << 16
MAX_LOG_LINES: Final = 500

HELP = """\
An editor starts this program and talks to it over its standard streams:
  Neovim 0.12   vim.lsp.config('albor', {cmd = {'albor-lsp'}}); vim.lsp.enable('albor')
                vim.lsp.inline_completion.enable()
  Helix         [language-server.albor]
                command = "albor-lsp"
  VS Code       install the extension albor

It uses the completion server that the setting serverUrl or the variable ALBOR_SERVER_URL names,
else one that runs on this machine, else it starts albor-serve.
`albor-lsp stats` prints what was suggested and accepted, --plot FILE.svg draws it.
Settings: ~/.config/albor/lsp.json, or the editor's, section "albor"; docs/lsp.md lists them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 fine, 1 failed, 2 asked for the impossible)."""
    return exit_code("albor-lsp", lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["stats"]:
        return _stats(arguments[1:])
    options = _parser().parse_args(arguments)
    lines: deque[str] = deque(maxlen=MAX_LOG_LINES)
    _set_up_logging(options.log_level, lines)
    if options.tcp is not None:
        return asyncio.run(_serve_tcp(options.tcp, lines))
    return asyncio.run(_serve_stdio(lines))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="albor-lsp",
        description="The language server of albor: code completion from your own machine.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--stdio", action="store_true", help="talk over standard streams (so it is)"
    )
    parser.add_argument(
        "--tcp", metavar="[HOST:]PORT", help="listen here instead, for one client at a time"
    )
    parser.add_argument(
        "--log-level",
        default="warning",
        choices=("debug", "info", "warning", "error"),
        help="how much to log, on standard error (%(default)s)",
    )
    parser.add_argument("--version", action="version", version=f"albor-lsp {__version__}")
    return parser


def _stats(arguments: list[str]) -> int:
    """Print, or plot, what was counted."""
    from pathlib import Path

    from albor_lsp.statistics import as_svg, as_text, read_days, statistics_path

    parser = Parser(
        prog="albor-lsp stats",
        description="Suggestions shown and accepted on this machine; nothing is sent anywhere.",
    )
    parser.add_argument("--json", action="store_true", help="print the counts by day as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw characters saved")
    options = parser.parse_args(arguments)
    days = read_days(statistics_path())
    if options.plot is not None:
        temporary = options.plot.with_name(options.plot.name + ".part")
        temporary.write_text(as_svg(days), "utf-8")
        temporary.replace(options.plot)
        print(f"wrote {options.plot}")
    if options.json:
        import json

        print(json.dumps(days, indent=1))
    elif options.plot is None:
        print(as_text(days), end="")
    return 0


class _Lines(logging.Handler):
    """Keeps the latest lines for the command albor.showLog."""

    def __init__(self, lines: deque[str]) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))


def _set_up_logging(level: str, lines: deque[str]) -> None:
    shape = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    stream = logging.StreamHandler()
    stream.setLevel(level.upper())
    handlers: list[logging.Handler] = [stream, _Lines(lines)]
    logger = logging.getLogger("albor_lsp")
    logger.setLevel(min(logging.INFO, stream.level))
    logger.propagate = False
    for handler in handlers:
        handler.setFormatter(shape)
    logger.handlers = handlers


async def _serve_stdio(lines: deque[str]) -> int:
    """Threads read and write, because standard streams may be files, pipes or sockets."""
    loop = asyncio.get_running_loop()
    # The protocol's own copy: whatever else prints must not get between the messages.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    incoming: asyncio.Queue[bytes] = asyncio.Queue()

    def read() -> None:
        stream = sys.stdin.fileno()
        while True:
            try:
                data = os.read(stream, READ_BYTES)
            except OSError:
                data = b""
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(incoming.put_nowait, data)
            if not data:
                return

    def write() -> None:
        try:
            while (data := outgoing.get()) is not None:
                view = memoryview(data)
                while view:
                    view = view[output.write(view) :]
        except OSError:
            loop.call_soon_threadsafe(incoming.put_nowait, b"")

    writer = threading.Thread(target=write, name="write", daemon=True)
    threading.Thread(target=read, name="read", daemon=True).start()
    writer.start()
    try:
        return await _serve(incoming, outgoing.put, lines)
    finally:
        outgoing.put(None)
        await asyncio.to_thread(writer.join, 1.0)
        # Reading may go on for ever; nothing waits for that thread.


async def _serve_tcp(where: str, lines: deque[str]) -> int:
    host, _, port = where.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"--tcp {where}: write [HOST:]PORT, as in 127.0.0.1:7070")
    busy = asyncio.Lock()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming: asyncio.Queue[bytes] = asyncio.Queue()

        async def read() -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(READ_BYTES):
                    incoming.put_nowait(data)
            incoming.put_nowait(b"")

        async with busy:
            reading = asyncio.create_task(read())
            try:
                await _serve(incoming, writer.write, lines)
            finally:
                reading.cancel()
                writer.close()

    server = await asyncio.start_server(talk, host or "127.0.0.1", int(port))
    address = server.sockets[0].getsockname()
    print(f"albor-lsp: listening on {address[0]}:{address[1]}", file=sys.stderr, flush=True)
    async with server:
        await server.serve_forever()
    return 0


async def _serve(incoming: asyncio.Queue[bytes], write: object, lines: deque[str]) -> int:
    assert callable(write)
    peer = Peer(write)
    server = LanguageServer(peer, lambda: list(lines))
    try:
        while not server.done.is_set():
            data = await incoming.get()
            if not data:
                break
            try:
                peer.feed(data)
            except FramingError as error:
                print(f"albor-lsp: {error}: an editor must start this", file=sys.stderr)
                return 1
        return server.exit_code if server.exit_code is not None else 1
    finally:
        await server.close()


if __name__ == "__main__":
    sys.exit(main())
