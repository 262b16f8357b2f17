"""Sockets and processes: listening, loading, draining."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from albor_serve.api.limits import MAX_HEADER_BYTES
from albor_serve.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Ready", "TlsFiles", "bind", "bind_unix", "serve"]

DRAIN_S = 10.0
"""How long running requests may go on after SIGINT or SIGTERM; a second signal ends them."""
LAST_WORDS_S = 2.0
"""How long a client may take to read the end of its answer once the engine has stopped."""
STALLED_S = 1.0
"""Once the server stops, a client that reads nothing of its answer for so long is cut off."""
STOP_LOADING_S = 5.0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Until something accepts, connections wait in its queue.

    Listening at once is what makes the port surely ours: two sockets may be bound to one port as
    long as neither listens.

    Raises:
        ConfigError: the address is in use, not this machine's, or not allowed.
    """
    if not host:
        # The system would take it for "every address of this machine".
        raise ConfigError("--host is empty: give an address of this machine such as 127.0.0.1")
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}: it must be 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named. Left on, the second
    # packet of each answer waits for the client's delayed acknowledgement, 40 ms on Linux.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen()
    except (OSError, UnicodeError) as error:
        sock.close()
        number = error.errno if isinstance(error, OSError) else None
        reason = error.strerror if isinstance(error, OSError) else "not a name"
        remedy = {
            errno.EADDRINUSE: "stop what uses it or choose another with --port",
            errno.EACCES: "choose a port above 1023 with --port",
        }.get(number or 0, "give an address of this machine with --host")
        raise ConfigError(f"cannot listen on {host} port {port} ({reason}): {remedy}") from error
    return sock


def bind_unix(path: Path) -> socket.socket:
    """A listening unix socket that only this user may connect to.

    A socket file that nobody listens on any more is replaced.

    Raises:
        ConfigError: the path is taken, too long or not allowed.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and _is_abandoned(path):
            path.unlink()
        old_mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(old_mask)
        sock.listen()
    except (OSError, ValueError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on the socket {path} ({reason}): give a path of your own with --uds"
        ) from error
    return sock


def _is_abandoned(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for https."""

    certificate: Path
    key: Path | None = None
    """None where the certificate's file holds it."""

    def check(self) -> None:
        """Raises ConfigError where they can't be used."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(
                f"cannot use the certificate {self.certificate} "
                f"({getattr(error, 'strerror', None) or error}): check --tls-cert and --tls-key, "
                f"which must be PEM files without a password"
            ) from None


def _no_password() -> str:
    # Without this OpenSSL would ask on the terminal.
    raise ValueError("the key has a password")


@dataclass(frozen=True, slots=True)
class Ready:
    """What `serve` needs once the model is loaded."""

    app: ASGIApp
    close: Callable[[float], None]
    """Take no more requests, give running ones so many seconds, cancel the rest. Called from any
    thread, more than once; a call with less patience ends an earlier one."""
    announce: Callable[[], None]
    """Called as soon as requests reach `app`."""


def serve(
    sock: socket.socket,
    start: Callable[[threading.Event], Ready],
    *,
    log_level: str = "warning",
    tls: TlsFiles | None = None,
) -> None:
    """Answer on a listening socket until SIGINT or SIGTERM; then let running requests finish.

    `start` loads the model on a thread of its own, beside the import of the web framework; until
    it returns, every request is answered with 503. The event that it gets is set when it should
    give up. Must be called on the main thread.

    Raises:
        Whatever `start` raised; the server has stopped then.
    """
    run = _Run(start)
    with _signals(run.on_signal):
        thread = threading.Thread(target=run.load, name="albor-load", daemon=True)
        thread.start()
        try:
            run.answer(sock, log_level, tls)
        finally:
            run.stop.set()
            thread.join(STOP_LOADING_S)
            if run.ready is not None:
                run.ready.close(0.0)
    if thread.is_alive():
        # It is deep in native code, which the interpreter's end would pull the floor from under.
        os._exit(0)
    if run.failure is not None and not isinstance(run.failure, KeyboardInterrupt):
        raise run.failure


class _Run:
    """One call of `serve`: the state that its threads and its signal handler share."""

    def __init__(self, start: Callable[[threading.Event], Ready]) -> None:
        self.stop = threading.Event()
        self.ready: Ready | None = None
        self.failure: BaseException | None = None
        self._start = start
        self._num_signals = 0

    def load(self) -> None:
        try:
            ready = self._start(self.stop)
            self.ready = ready
            if not self.stop.is_set():
                ready.announce()
        except BaseException as error:  # noqa: BLE001 - raised again by `serve`
            self.failure = error
            self.stop.set()

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._num_signals += 1
        self.stop.set()

    def answer(self, sock: socket.socket, log_level: str, tls: TlsFiles | None) -> None:
        """Run the event loop until `stop` is set and everything has drained."""
        import uvicorn

        import albor_serve.api.app  # noqa: F401 - the loading thread needs it next
        from albor_serve.api.protocol import GuardedH11

        run = self

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                run.on_signal(sig, frame)

            async def on_tick(self, counter: int) -> bool:
                return run.stop.is_set() or await super().on_tick(counter)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                draining = asyncio.create_task(run.drain(self))
                await super().shutdown(sockets)
                await draining

        config = uvicorn.Config(
            self._gate,
            log_level=log_level,
            access_log=False,  # the application logs requests, with their ids
            log_config=None,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=int(DRAIN_S + LAST_WORDS_S),
            lifespan="off",
            http=GuardedH11,
            ws="none",
            interface="asgi3",
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else tls.key,
        )
        Server(config).run(sockets=[sock])

    async def drain(self, server: uvicorn.Server) -> None:
        """Close the engine, at once after a second signal, so that every answer gets its end."""
        if self.ready is None:
            return
        stalled_since: dict[Any, float] = {}
        closing = asyncio.ensure_future(asyncio.to_thread(self.ready.close, DRAIN_S))
        while not closing.done():
            await asyncio.wait([closing], timeout=0.05)
            _cut_stalled(server, stalled_since)
            if self._num_signals > 1:
                await asyncio.to_thread(self.ready.close, 0.0)
                await asyncio.sleep(0.2)
                server.force_exit = True
                break
        await closing
        last_words = time.monotonic() + LAST_WORDS_S
        while server.server_state.connections and time.monotonic() < last_words:
            await asyncio.sleep(0.05)
            _cut_stalled(server, stalled_since)
        for connection in list(server.server_state.connections):
            connection.transport.abort()

    async def _gate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, or 503 while there is none."""
        ready = self.ready
        if ready is None:
            from albor_serve.api.errors import LoadingError, error_response

            error = LoadingError("the model is loading: try again in a moment")
            await error_response(error)(scope, receive, send)
            return
        # Only the end of the server cancels; by then the client has had its time.
        with contextlib.suppress(asyncio.CancelledError):
            await ready.app(scope, receive, send)


def _cut_stalled(server: uvicorn.Server, since: dict[Any, float]) -> None:
    """Cut off clients whose socket has been full for STALLED_S; `since` remembers them."""
    now = time.monotonic()
    for connection in list(server.server_state.connections):
        transport = connection.transport
        if transport is None or not transport.get_write_buffer_size():
            since.pop(connection, None)
        elif now - since.setdefault(connection, now) > STALLED_S:
            transport.abort()


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
