"""uvicorn's HTTP/1.1 connection with the limits that it lacks.

Without them a connection that sends nothing, or one byte now and then, stays for ever: uvicorn
times only the pause between an answer and the first byte of the next request.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from albor_serve.api import limits

__all__ = ["GuardedH11"]


class GuardedH11(H11Protocol):
    """Closes connections whose request head takes too long, and those above MAX_CONNECTIONS."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]
        self, transport: asyncio.Transport
    ) -> None:
        """Start timing, or refuse the connection."""
        super().connection_made(transport)
        if len(self.connections) > limits.MAX_CONNECTIONS:
            transport.abort()
            return
        self._time_head()

    def data_received(self, data: bytes) -> None:
        """Hand the bytes on; the head's time runs until a request has begun."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timing()
        elif self.timeout_keep_alive_task is None and self._head_timer is None:
            self._time_head()

    def on_response_complete(self) -> None:
        """Between requests uvicorn's own, shorter limit holds."""
        self._stop_timing()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer: it holds this connection in memory."""
        self._stop_timing()
        super().connection_lost(exc)

    def _time_head(self) -> None:
        self._head_timer = self.loop.call_later(limits.HEADER_S, self.transport.abort)

    def _stop_timing(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
