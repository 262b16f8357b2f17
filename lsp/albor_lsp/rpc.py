"""JSON-RPC 2.0 with LSP's framing, both ways, without threads or I/O of its own.

Messages are handled in the order in which they came. A handler is a plain function: what it does
before it returns sees the documents exactly as they were when the client sent the request. What
takes time goes into a coroutine that it returns; a `$/cancelRequest` cancels that.

Written here because the packages that do this need 0.4 s to import, more than the whole start-up
of this program may take.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, Final

__all__ = ["FramingError", "Peer", "RpcError"]

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
REQUEST_CANCELLED: Final = -32800
MAX_HEADER_BYTES: Final = 4096
MAX_MESSAGE_BYTES: Final = 1 << 28

Handler = Callable[[Any], Any]
"""Takes `params`; returns the result, or a coroutine of it."""

_log = logging.getLogger("albor_lsp")


class FramingError(Exception):
    """The input is no longer a sequence of LSP messages; nothing after it can be read."""


class RpcError(Exception):
    """An error answer, given or received.

    Attributes:
        code: JSON-RPC's.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Peer:
    """One connection. Used from one event loop.

    Attributes:
        handlers: functions by method, for requests and notifications alike.
        gate: called before each message with (method, is_request); raises RpcError to refuse.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.handlers: dict[str, Handler] = {"$/cancelRequest": self._cancel}
        self.gate: Callable[[str, bool], None] = lambda _method, _is_request: None
        self._write = write
        self._buffer = bytearray()
        self._wanted: int | None = None
        self._ids = count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._running: dict[Any, asyncio.Task[None]] = {}

    def feed(self, data: bytes) -> None:
        """Handle the messages that `data` completes.

        Raises:
            FramingError: what came is not LSP.
        """
        self._buffer += data
        while (message := self._next()) is not None:
            self._receive(message)

    def notify(self, method: str, params: Any) -> None:
        """Send a notification."""
        self._send({"method": method, "params": params})

    async def request(self, method: str, params: Any) -> Any:
        """Send a request; returns its result.

        Raises:
            RpcError: the other side refused.
        """
        request_id = next(self._ids)
        answer = asyncio.get_running_loop().create_future()
        self._asked[request_id] = answer
        try:
            self._send({"id": request_id, "method": method, "params": params})
            return await answer
        finally:
            self._asked.pop(request_id, None)

    async def close(self) -> None:
        """Cancel everything that runs or waits; nothing is sent afterwards."""
        self._write = _discard
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for answer in self._asked.values():
            answer.cancel()

    def _next(self) -> bytes | None:
        if self._wanted is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEADER_BYTES:
                    raise FramingError("no Content-Length header at the start of a message")
                return None
            self._wanted = _content_length(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
        if len(self._buffer) < self._wanted:
            return None
        message = bytes(self._buffer[: self._wanted])
        del self._buffer[: self._wanted]
        self._wanted = None
        return message

    def _receive(self, data: bytes) -> None:
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            self._refuse(None, PARSE_ERROR, "the message is not valid JSON")
            return
        if not isinstance(message, dict):
            self._refuse(None, INVALID_REQUEST, "the message is not an object")
            return
        method, request_id = message.get("method"), message.get("id")
        if isinstance(method, str):
            self._call(method, message.get("params"), request_id, is_request="id" in message)
        elif isinstance(request_id, int) and request_id in self._asked:
            self._resolve(self._asked[request_id], message)
        elif method is not None:
            self._refuse(request_id, INVALID_REQUEST, "method is not a string")

    def _resolve(self, answer: asyncio.Future[Any], message: dict[str, Any]) -> None:
        if answer.done():
            return
        error = message.get("error")
        if isinstance(error, dict):
            answer.set_exception(RpcError(int(error.get("code", 0)), str(error.get("message"))))
        else:
            answer.set_result(message.get("result"))

    def _call(self, method: str, params: Any, request_id: Any, *, is_request: bool) -> None:
        try:
            self.gate(method, is_request)
            handler = self.handlers.get(method)
            if handler is None:
                if is_request:
                    raise RpcError(METHOD_NOT_FOUND, f"no such method: {method[:100]}")
                return
            result = handler(params)
        except Exception as error:  # noqa: BLE001 - one bad message must not end the rest
            self._fail(method, error, request_id, is_request=is_request)
            return
        if asyncio.iscoroutine(result):
            task = asyncio.get_running_loop().create_task(
                self._finish(method, result, request_id, is_request=is_request)
            )
            key = request_id if is_request else object()
            self._running[key] = task
            task.add_done_callback(lambda _task: self._running.pop(key, None))
        elif is_request:
            self._send({"id": request_id, "result": result})

    async def _finish(
        self, method: str, work: Coroutine[Any, Any, Any], request_id: Any, *, is_request: bool
    ) -> None:
        try:
            result = await work
        except asyncio.CancelledError:
            if is_request:
                self._refuse(request_id, REQUEST_CANCELLED, "cancelled")
        except Exception as error:  # noqa: BLE001
            self._fail(method, error, request_id, is_request=is_request)
        else:
            if is_request:
                self._send({"id": request_id, "result": result})

    def _fail(self, method: str, error: Exception, request_id: Any, *, is_request: bool) -> None:
        if isinstance(error, RpcError):
            code, text = error.code, str(error)
        elif isinstance(error, KeyError | TypeError | ValueError | AttributeError):
            code, text = INVALID_PARAMS, f"{method[:100]}: params are not of the expected shape"
            _log.debug("%s: %r", method, error, exc_info=error)
        else:
            code, text = INTERNAL_ERROR, f"{method[:100]}: {type(error).__name__}"
            _log.error("%s: %r", method, error, exc_info=error)
        if is_request:
            self._refuse(request_id, code, text)

    def _cancel(self, params: Any) -> None:
        task = self._running.get(params["id"])
        if task is not None:
            task.cancel()

    def _refuse(self, request_id: Any, code: int, message: str) -> None:
        self._send({"id": request_id, "error": {"code": code, "message": message}})

    def _send(self, message: dict[str, Any]) -> None:
        # ASCII only: lone surrogates, which editors can hold, survive as escapes.
        data = json.dumps({"jsonrpc": "2.0"} | message, separators=(",", ":")).encode()
        self._write(b"Content-Length: %d\r\n\r\n" % len(data) + data)


def _content_length(header: bytes) -> int:
    for line in header.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            size = int(value)
            if size > MAX_MESSAGE_BYTES:
                raise FramingError(f"a message of {size} bytes; at most {MAX_MESSAGE_BYTES}")
            return size
    raise FramingError("a message without Content-Length")


def _discard(_data: bytes) -> None:
    """Write nowhere."""
