"""Sockets and processes: listening, draining, exit codes."""

from __future__ import annotations

import signal
import socket
from typing import Any

from albor_serve.errors import ConfigError

__all__ = ["bind", "serve"]

DRAIN_S = 10
"""How long running requests may go on after Ctrl-C or SIGTERM; a second signal ends them."""
MAX_HEADER_BYTES = 32 * 1024


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet.

    Raises:
        ConfigError: the address is in use, not this machine's, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port} ({reason}): stop what uses it or choose another "
            f"with --port"
        ) from error
    return sock


def serve(app: Any, sock: socket.socket, *, log_level: str = "warning") -> None:
    """Serve until SIGINT or SIGTERM, then let running requests finish."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level=log_level,
        access_log=log_level in ("debug", "info"),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="off",
        http="h11",
    )
    # uvicorn raises the signal again when it is done; that must not become a traceback or an
    # exit code other than 0.
    previous = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        uvicorn.Server(config).run(sockets=[sock])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
