"""A small HTTP/1.1 client: keep-alive, unix sockets, TLS, server-sent events.

Cancelling a request's task closes its connection, which is how servers learn that nobody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from albor_lsp import __version__
from albor_lsp.errors import ServerDownError, ServerRefusedError, SettingsError

__all__ = ["Address", "HttpClient", "parse_address"]

LIMIT_BYTES: Final = 1 << 20
MAX_BODY_BYTES: Final = 1 << 26
CONNECT_S: Final = 5.0
MAX_IDLE: Final = 4

OnEvent = Callable[[dict[str, Any]], None]
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    port: int = 8080
    is_tls: bool = False
    socket_path: str | None = None
    base_path: str = ""
    """Put before each path, without a slash at its end."""

    def __str__(self) -> str:
        if self.socket_path is not None:
            return f"unix:{self.socket_path}"
        scheme = "https" if self.is_tls else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}{self.base_path}"


def parse_address(url: str) -> Address:
    """Read `http(s)://host[:port][/path]` or `unix:/path`; a `/v1` at the end is left out.

    Raises:
        SettingsError: it is neither.
    """
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise SettingsError(f"{url}: a unix socket needs a full path, as in unix:/run/albor")
        return Address(socket_path=path)
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        raise SettingsError(f"{url} is not an address: write http://host:port") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"{url} is not an address: write http://host:port")
    is_tls = parts.scheme == "https"
    base = parts.path.rstrip("/").removesuffix("/v1")
    return Address(parts.hostname, port or (443 if is_tls else 80), is_tls, None, base)


class HttpClient:
    """Requests to one server. Used from one event loop; `close` when done."""

    def __init__(self, address: Address, api_key: str = "") -> None:
        self.address = address
        self._api_key = api_key
        self._idle: list[Stream] = []

    async def get(self, path: str, *, timeout_s: float) -> Any:
        """GET; returns the parsed answer. Raises as `post` does."""
        return await self._ask("GET", path, None, {}, None, timeout_s)

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        *,
        timeout_s: float,
        headers: dict[str, str] | None = None,
        on_event: OnEvent | None = None,
    ) -> Any:
        """POST JSON; returns the parsed answer, or None after the last event of a stream.

        With `on_event` each server-sent event's object is passed to it as it comes.

        Raises:
            ServerDownError: no connection, no answer in time, or it broke off.
            ServerRefusedError: a status other than 200.
        """
        return await self._ask("POST", path, body, headers or {}, on_event, timeout_s)

    async def close(self) -> None:
        """Close the connections that are kept."""
        idle, self._idle = self._idle, []
        for stream in idle:
            await _close(stream)

    async def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        headers: dict[str, str],
        on_event: OnEvent | None,
        timeout_s: float,
    ) -> Any:
        head, data = self._head(method, path, body, headers)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    stream, is_fresh = await self._stream()
                    try:
                        return await self._exchange(stream, head + data, on_event)
                    except (ConnectionError, asyncio.IncompleteReadError):
                        # A kept connection may have been closed meanwhile; a new one says more.
                        if is_fresh:
                            raise
        except TimeoutError:
            raise ServerDownError(f"{self.address} did not answer in {timeout_s:.0f} s") from None
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "it broke off"
            raise ServerDownError(f"{self.address} can't be reached: {reason}") from error
        except (ValueError, LookupError) as error:
            raise ServerDownError(f"{self.address} does not speak HTTP with JSON") from error

    def _head(
        self, method: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]
    ) -> tuple[bytes, bytes]:
        data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        address = self.address
        host = "localhost" if address.socket_path else f"{address.host}:{address.port}"
        lines = [
            f"{method} {address.base_path}{path} HTTP/1.1",
            f"Host: {host}",
            f"User-Agent: albor-lsp/{__version__}",
            "Accept: application/json, text/event-stream",
        ]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        if self._api_key:
            lines.append(f"Authorization: Bearer {self._api_key}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace"), data

    async def _stream(self) -> tuple[Stream, bool]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return (reader, writer), False
            await _close((reader, writer))
        address = self.address
        async with asyncio.timeout(CONNECT_S):
            if address.socket_path is not None:
                stream = await asyncio.open_unix_connection(address.socket_path, limit=LIMIT_BYTES)
            else:
                tls = ssl.create_default_context() if address.is_tls else None
                stream = await asyncio.open_connection(
                    address.host, address.port, ssl=tls, limit=LIMIT_BYTES
                )
        return stream, True

    async def _exchange(self, stream: Stream, request: bytes, on_event: OnEvent | None) -> Any:
        reader, writer = stream
        is_reusable = False
        try:
            writer.write(request)
            await writer.drain()
            status, headers = await _read_head(reader)
            is_stream = headers.get("content-type", "").startswith("text/event-stream")
            if status == 200 and is_stream and on_event is not None:
                await _read_events(reader, headers, on_event)
                answer = None
            else:
                body = await _read_body(reader, headers)
                if status != 200:
                    raise ServerRefusedError(status, _reason(status, body))
                answer = json.loads(body) if body.strip() else None
            is_reusable = headers.get("connection", "").lower() != "close" and (
                "content-length" in headers or "transfer-encoding" in headers
            )
            return answer
        except ServerRefusedError:
            is_reusable = "content-length" in headers
            raise
        finally:
            if is_reusable and len(self._idle) < MAX_IDLE:
                self._idle.append(stream)
            else:
                writer.close()


async def _close(stream: Stream) -> None:
    stream[1].close()
    with contextlib.suppress(OSError):
        await stream[1].wait_closed()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first = await reader.readline()
    if not first:
        raise ConnectionResetError(None, None)
    status = int(first.split()[1])
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        parts = bytearray()
        while chunk := await _read_chunk(reader):
            parts += chunk
            if len(parts) > MAX_BODY_BYTES:
                raise ValueError("body")
        return bytes(parts)
    if "content-length" in headers:
        size = int(headers["content-length"])
        if not 0 <= size <= MAX_BODY_BYTES:
            raise ValueError("body")
        return await reader.readexactly(size)
    return await reader.read(MAX_BODY_BYTES)


async def _read_chunk(reader: asyncio.StreamReader) -> bytes:
    """The next chunk; empty after the last one, whose trailers are read too."""
    line = await reader.readline()
    if not line:
        raise asyncio.IncompleteReadError(b"", None)
    size = int(line.split(b";")[0], 16)
    if not 0 <= size <= MAX_BODY_BYTES:
        raise ValueError("chunk")
    if size == 0:
        while (await reader.readline()).strip():
            pass
        return b""
    data = await reader.readexactly(size)
    await reader.readexactly(2)
    return data


async def _read_events(
    reader: asyncio.StreamReader, headers: dict[str, str], on_event: OnEvent
) -> None:
    is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    buffer = b""
    while True:
        data = await (_read_chunk(reader) if is_chunked else reader.read(1 << 16))
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                text = line[5:].strip()
                if text and text != b"[DONE]":
                    event = json.loads(text)
                    if isinstance(event, dict):
                        on_event(event)
        if not data:
            return


def _reason(status: int, body: bytes) -> str:
    """A server's own words where it has some, in one line."""
    try:
        error = json.loads(body)
        error = error.get("error", error) if isinstance(error, dict) else {}
        text = error.get("message") if isinstance(error, dict) else error
        if isinstance(error, dict) and not text:
            text = error.get("detail")
    except ValueError:
        text = None
    words = " ".join(str(text).split())[:200] if text else ""
    if status in (401, 403):
        return f"the server wants another key (HTTP {status}): set apiKey"
    return f"the server answered HTTP {status}" + (f": {words}" if words else "")
