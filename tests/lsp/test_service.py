"""The HTTP client and the service against servers of every kind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from albor_lsp.errors import ServerDownError, ServerRefusedError, SettingsError
from albor_lsp.http import Address, HttpClient, parse_address
from albor_lsp.service import Ask, Health, Service

from tests.lsp.fakes import FakeServer, until

ASK = Ask("a = ", "\nb", "a.py", "s")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def service_of(server: FakeServer, **more: Any) -> tuple[Service, list[Health]]:
    healths: list[Health] = []

    async def find() -> Address:
        return Address(port=server.port)

    return Service(find, on_health=healths.append, **more), healths


@contextlib.asynccontextmanager
async def ready(server: FakeServer, **more: Any) -> Any:
    service, healths = service_of(server, **more)
    service.start()
    try:
        await until(lambda: service.is_ready)
        yield service, healths
    finally:
        await service.close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://a:1", Address("a", 1)),
        ("a:1", Address("a", 1)),
        ("https://h/x/v1/", Address("h", 443, True, None, "/x")),
        ("http://[::1]:5", Address("::1", 5)),
        ("unix:/run/a.sock", Address(socket_path="/run/a.sock")),
        ("unix:///run/a.sock", Address(socket_path="/run/a.sock")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["ftp://a", "http://", "unix:relative", "http://a:99999", "http://a:b"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match=text.split(":", maxsplit=1)[0]):
        parse_address(text)


def test_a_connection_is_kept_and_a_closed_one_replaced() -> None:
    async def main() -> None:
        async with FakeServer() as server:
            client = HttpClient(Address(port=server.port))
            for _ in range(3):
                await client.post("/v1/completions", {"max_tokens": 1}, timeout_s=5)
            assert server.num_connections == 1
            port = server.port
            await server.stop()
            await server.start(port)
            await client.post("/v1/completions", {"max_tokens": 1}, timeout_s=5)
            assert server.num_connections == 2
            await client.close()

    run(main())


def test_cancelling_closes_the_connection() -> None:
    async def main() -> None:
        async with FakeServer() as server:
            server.delay_s = 30
            client = HttpClient(Address(port=server.port))
            asking = asyncio.create_task(client.post("/v1/completions", {}, timeout_s=60))
            await until(lambda: bool(server.bodies))
            asking.cancel()
            await until(lambda: server.num_closed == 1)

    run(main())


def test_a_unix_socket(tmp_path: Path) -> None:
    async def main() -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.0 200 OK\r\n\r\n[1]")
            writer.close()

        path = tmp_path / "s"
        async with await asyncio.start_unix_server(talk, path):
            client = HttpClient(Address(socket_path=str(path)))
            assert await client.get("/", timeout_s=5) == [1]

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{{{",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 21),
    ],
)
def test_nonsense_is_a_server_that_is_down(answer: bytes) -> None:
    async def main() -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
            client = HttpClient(Address(port=server.sockets[0].getsockname()[1]))
            with pytest.raises(ServerDownError):
                await client.get("/", timeout_s=5)

    run(main())


def test_a_slow_server_is_down_in_time() -> None:
    async def main() -> None:
        async with FakeServer() as server:
            server.delay_s = 30
            client = HttpClient(Address(port=server.port))
            with pytest.raises(ServerDownError, match="did not answer"):
                await client.post("/v1/completions", {}, timeout_s=0.05)

    run(main())


def test_albor_gets_everything_and_streams() -> None:
    async def main() -> None:
        async with FakeServer(lambda _body: "hello world") as server:  # noqa: SIM117
            async with ready(server) as (service, healths):
                assert [each.state for each in healths] == ["ready"]
                assert service.model == "fake"
                pieces: list[str] = []
                answer = await service.complete(
                    Ask("p", "s", "a.py", "me", typed_ahead="t", drafts=("d",)), pieces.append
                )
                assert answer.texts == ("hello world",)
                assert "".join(pieces) == "hello world"
                assert len(pieces) > 1
                assert answer.confidence == 0.5
                assert answer.timings["total_ms"] == 2.0
                extension = server.bodies[0]["albor"]
                assert extension["session"] == "me"
                assert extension["typed_ahead"] == "t"
                assert extension["drafts"] == ["d"]

    run(main())


def test_llama_server_is_asked_by_infill() -> None:
    async def main() -> None:
        async with FakeServer(lambda _body: "mid") as server:
            server.models = {"data": [{"id": "m.gguf", "owned_by": "llamacpp"}]}
            async with ready(server) as (service, _):
                answer = await service.complete(ASK)
                assert answer.texts == ("mid",)
                assert server.paths[-1] == "/infill"
                assert server.bodies[-1]["input_prefix"] == "a = "
                assert server.bodies[-1]["stop"] == ["\n"]
                assert service.capabilities is not None
                assert service.capabilities.works_ahead

    run(main())


def test_a_server_that_refuses_suffix_gets_the_familys_tokens() -> None:
    async def main() -> None:
        async with FakeServer(lambda _body: "mid") as server:
            server.models = {"data": [{"id": "Qwen2.5-Coder-1.5B", "owned_by": "vllm"}]}
            server.no_suffix = True
            async with ready(server) as (service, _):
                await service.complete(Ask("a", "b", "p", "s", typed_ahead="c"))
                prompt = server.bodies[-1]["prompt"]
                assert prompt == "<|fim_prefix|>ac<|fim_suffix|>b<|fim_middle|>"
                assert "<|endoftext|>" in server.bodies[-1]["stop"]

    run(main())


def test_a_server_with_suffix_is_asked_with_it() -> None:
    async def main() -> None:
        async with FakeServer(lambda _body: "mid") as server:
            server.models = {"data": [{"id": "x", "owned_by": "library"}]}
            async with ready(server) as (service, _):
                assert (await service.complete(ASK)).texts == ("mid",)
                assert server.bodies[-1]["suffix"] == "\nb"
                assert "albor" not in server.bodies[-1]

    run(main())


def test_a_model_that_cannot_fill_in_is_refused_with_a_word() -> None:
    async def main() -> None:
        async with FakeServer() as server:
            server.models = {"data": [{"id": "poet", "owned_by": "vllm"}]}
            server.no_suffix = True
            service, healths = service_of(server)
            service.start()
            await until(lambda: bool(healths))
            assert healths[0].state == "error"
            assert "does not fill in the middle with poet" in healths[0].message
            await service.close()

    run(main())


def test_a_wrong_key_is_said_once_and_a_right_one_heals() -> None:
    async def main() -> None:
        async with FakeServer() as server:
            server.key = "right"
            service, healths = service_of(server, api_key="wrong")
            service.start()
            await asyncio.sleep(1.0)
            assert len(healths) == 1
            assert "set apiKey" in healths[0].message
            await service.restart(api_key="right", model="")
            await until(lambda: service.is_ready)
            await service.close()

    run(main())


@pytest.mark.parametrize("status", [404, 405, 501])
def test_something_else_on_the_port_is_told_with_its_address(status: int) -> None:
    async def main() -> None:
        async with FakeServer() as server:
            server.status = status
            service, healths = service_of(server)
            service.start()
            await until(lambda: bool(healths))
            assert healths[0].state == "error"
            assert f"http://127.0.0.1:{server.port} is no completion server" in healths[0].message
            assert "check serverUrl" in healths[0].message
            await service.close()

    run(main())


def test_a_server_that_goes_and_comes_back() -> None:
    async def main() -> None:
        async with FakeServer(lambda _body: "x") as server:  # noqa: SIM117
            async with ready(server) as (service, healths):
                generation = service.generation
                await server.stop()
                for _ in range(5):
                    with pytest.raises(ServerDownError):
                        await service.complete(ASK)
                await asyncio.sleep(0.4)
                assert [each.state for each in healths] == ["ready", "offline"]
                await server.start()
                await until(lambda: service.is_ready)
                assert service.generation == generation + 1
                assert (await service.complete(ASK)).texts == ("x",)

    run(main())


def test_an_error_answer_leaves_the_server_ready() -> None:
    async def main() -> None:
        async with FakeServer() as server, ready(server) as (service, _):
            server.status = 400
            with pytest.raises(ServerRefusedError, match="told to fail"):
                await service.complete(ASK)
            assert service.is_ready
            server.status = 503
            with pytest.raises(ServerRefusedError):
                await service.complete(ASK)
            assert service.health.state == "loading"

    run(main())
