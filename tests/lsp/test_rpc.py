"""Framing, order, cancelling, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from albor_lsp.rpc import FramingError, Peer, RpcError


def frame(message: Any) -> bytes:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return b"Content-Length: %d\r\n\r\n" % len(data) + data


class Wire:
    """What a peer sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.peer = Peer(self._take)

    def _take(self, data: bytes) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        assert int(head.split(b":")[1]) == len(body)
        self.sent.append(json.loads(body))


def run(work: Any) -> Any:
    return asyncio.run(work)


def test_a_message_may_come_byte_by_byte_or_many_at_once() -> None:
    async def main() -> None:
        wire = Wire()
        wire.peer.handlers["add"] = lambda params: params[0] + params[1]
        data = b"".join(
            frame({"jsonrpc": "2.0", "id": n, "method": "add", "params": [n, 1]}) for n in range(3)
        )
        for at in range(len(data)):
            wire.peer.feed(data[at : at + 1])
        wire.peer.feed(data)
        assert [each["result"] for each in wire.sent] == [1, 2, 3, 1, 2, 3]

    run(main())


def test_a_request_sees_the_state_of_its_place_in_the_order() -> None:
    async def main() -> None:
        wire, state = Wire(), ["old"]

        def ask(_params: Any) -> Any:
            seen = state[0]

            async def later() -> str:
                await asyncio.sleep(0)
                return seen

            return later()

        wire.peer.handlers |= {"ask": ask, "set": lambda value: state.__setitem__(0, value)}
        wire.peer.feed(
            frame({"id": 1, "method": "ask"}) + frame({"method": "set", "params": "new"})
        )
        await asyncio.sleep(0.01)
        assert wire.sent[0]["result"] == "old"

    run(main())


def test_a_cancelled_request_is_answered() -> None:
    async def main() -> None:
        wire = Wire()

        async def forever() -> None:
            await asyncio.sleep(60)

        wire.peer.handlers["wait"] = lambda _params: forever()
        wire.peer.feed(frame({"id": "x", "method": "wait"}))
        await asyncio.sleep(0)
        wire.peer.feed(frame({"method": "$/cancelRequest", "params": {"id": "x"}}))
        wire.peer.feed(frame({"method": "$/cancelRequest", "params": {"id": 99}}))
        await asyncio.sleep(0.01)
        assert wire.sent == [
            {"jsonrpc": "2.0", "id": "x", "error": {"code": -32800, "message": "cancelled"}}
        ]

    run(main())


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"{", -32700),
        ([1], -32600),
        ({"id": 1, "method": 7}, -32600),
        ({"id": 1, "method": "none"}, -32601),
        ({"id": 1, "method": "shape", "params": None}, -32602),
        ({"id": 1, "method": "bug"}, -32603),
        ({"id": 1, "method": "refuse"}, -7),
    ],
)
def test_errors_have_codes_and_end_nothing(message: Any, code: int) -> None:
    async def main() -> None:
        wire = Wire()

        def bug(_params: Any) -> None:
            raise ZeroDivisionError

        def refuse(_params: Any) -> None:
            raise RpcError(-7, "no")

        wire.peer.handlers |= {
            "bug": bug,
            "refuse": refuse,
            "shape": lambda params: params["x"],
            "fine": lambda _params: "fine",
        }
        wire.peer.feed(frame(message) + frame({"id": 2, "method": "fine"}))
        assert wire.sent[0]["error"]["code"] == code
        assert wire.sent[1]["result"] == "fine"

    run(main())


@pytest.mark.parametrize(
    "data", [b"x" * 5000, b"X: 1\r\n\r\n", b"Content-Length: 99999999999\r\n\r\n"]
)
def test_what_is_not_lsp_ends_the_connection(data: bytes) -> None:
    with pytest.raises(FramingError):
        Peer(lambda _data: None).feed(data)


def test_our_own_requests_get_their_answers() -> None:
    async def main() -> None:
        wire = Wire()
        asking = asyncio.create_task(wire.peer.request("q", {"a": 1}))
        refused = asyncio.create_task(wire.peer.request("q", None))
        await asyncio.sleep(0)
        wire.peer.feed(frame({"id": wire.sent[0]["id"], "result": [1]}))
        wire.peer.feed(frame({"id": wire.sent[1]["id"], "error": {"code": 5, "message": "no"}}))
        wire.peer.feed(frame({"id": 12345, "result": None}))
        assert await asking == [1]
        with pytest.raises(RpcError, match="no"):
            await refused

    run(main())
