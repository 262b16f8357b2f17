"""One JSON request over a fresh loopback connection; cancelling the task closes it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from albor_serve.errors import BackendError

__all__ = ["get_text", "post_json"]

LIMIT_BYTES = 1 << 24


async def post_json(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST and return the answer's object.

    Raises:
        BackendError: the server refused it or broke off.
    """
    status, data = await _exchange(address, "POST", path, json.dumps(body).encode())
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError:
        answer = {}
    if status != 200 or not isinstance(answer, dict):
        raise BackendError(f"the server at {address} answered {path} with {status}: {data[:200]!r}")
    return answer


async def get_text(address: str, path: str) -> str:
    """GET; "" unless the answer is 200."""
    status, data = await _exchange(address, "GET", path, b"")
    return data.decode("utf-8", "replace") if status == 200 else ""


async def _exchange(address: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    host, _, port = address.rpartition(":")
    writer = None
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=LIMIT_BYTES)
        head = f"{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        headers: dict[str, str] = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip().lower()
        return status, await _read_body(reader, headers)
    except (OSError, LookupError, ValueError, EOFError) as error:
        raise BackendError(f"the server at {address} broke off: {error!r}") from error
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while size := int((await reader.readline()).split(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        return b"".join(parts)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()
