"""A completion server that answers as told, and editors that talk to the language server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

Reply = Callable[[dict[str, Any]], str]
LSP_FOLDER = Path(__file__).parents[2] / "lsp"


class FakeServer:
    """albor-serve's routes. `reply` turns a body into the text of its answer.

    Attributes:
        logprobs: makes the log-probabilities of a body's answer; without it, one sure token.
        bodies: of all completion requests.
        num_closed: connections closed by the client while an answer was awaited.
    """

    def __init__(self, reply: Reply = lambda _body: "x") -> None:
        self.reply = reply
        self.logprobs: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self.models: Any = {"data": [{"id": "fake", "owned_by": "albor"}]}
        self.delay_s = 0.0
        self.piece_delay_s = 0.0
        self.status = 200
        self.key = ""
        self.no_suffix = False
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.num_closed = 0
        self.num_connections = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Bodies of questions, without warm-ups."""
        return [body for body in self.bodies if body.get("max_tokens")]

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", port or self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        self.num_connections += 1
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers: dict[str, str] = {}
                while header := (await reader.readline()).strip().decode():
                    name, _, value = header.partition(": ")
                    headers[name.lower()] = value
                body = json.loads(
                    await reader.readexactly(int(headers.get("content-length", 0))) or b"null"
                )
                answering = asyncio.create_task(self._answer(method, path, headers, body, writer))
                watching = asyncio.create_task(reader.read(1))
                await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    self.num_closed += 1
                    answering.cancel()
                    watching.exception()
                    return
                answering.result()
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await watching
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: Any, out: asyncio.StreamWriter
    ) -> None:
        self.paths.append(path)
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            _send(out, 401, {"error": {"message": "no such key"}})
        elif self.status != 200:
            _send(out, self.status, {"error": {"message": "told to fail"}})
        elif method == "GET":
            _send(out, 200, self.models)
        elif self.no_suffix and "suffix" in body:
            _send(out, 400, {"error": {"message": "suffix is not currently supported"}})
        else:
            self.bodies.append(body)
            await self._complete(path, body, out)
        await out.drain()

    async def _complete(self, path: str, body: dict[str, Any], out: asyncio.StreamWriter) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        text = self.reply(body) if body.get("max_tokens", body.get("n_predict")) else ""
        timings = {"timings": {"queue_ms": 0.0, "prefill_ms": 1.0, "total_ms": 2.0}}
        is_infill = path == "/infill"
        if not body.get("stream"):
            choices = [{"index": i, "text": text} for i in range(body.get("n", 1))]
            for choice in choices:
                if "logprobs" in body and self.logprobs is not None:
                    choice["logprobs"] = self.logprobs(body)
                elif "logprobs" in body:
                    choice["logprobs"] = {"tokens": [text], "token_logprobs": [-0.1]}
            _send(out, 200, {"content": text} if is_infill else {"choices": choices})
            return
        out.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
        out.write(b"Transfer-Encoding: chunked\r\n\r\n")
        pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
        for piece in pieces:
            _event(out, {"content": piece} if is_infill else {"choices": [{"text": piece}]})
            if self.piece_delay_s:
                await out.drain()
                await asyncio.sleep(self.piece_delay_s)
        last = {"choices": [{"text": "", "albor": {"confidence": 0.5}}], "albor": timings}
        _event(
            out, {"content": "", "stop": True, "timings": {"prompt_n": 3}} if is_infill else last
        )
        _chunk(out, b"data: [DONE]\n\n")
        out.write(b"0\r\n\r\n")


def _send(out: asyncio.StreamWriter, status: int, value: Any) -> None:
    data = json.dumps(value).encode()
    out.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n" % status)
    out.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)


def _event(out: asyncio.StreamWriter, value: Any) -> None:
    _chunk(out, b"data: " + json.dumps(value).encode() + b"\n\n")


def _chunk(out: asyncio.StreamWriter, data: bytes) -> None:
    out.write(b"%x\r\n" % len(data) + data + b"\r\n")


class Editor:
    """A client of a real albor-lsp process, as small as can be."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.notifications: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.configuration: Any = None
        self.num_late = 0
        self.patience_s = 20.0
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps({"jsonrpc": "2.0"} | message).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)

    def notify(self, method: str, params: Any) -> None:
        self.send({"method": method, "params": params})

    def ask_later(self, method: str, params: Any) -> tuple[int, asyncio.Future[dict[str, Any]]]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.send({"id": number, "method": method, "params": params})
        return number, answer

    async def ask_raw(self, method: str, params: Any = None) -> dict[str, Any]:
        async with asyncio.timeout(self.patience_s):
            return await self.ask_later(method, params)[1]

    async def ask(self, method: str, params: Any = None) -> Any:
        answer = await self.ask_raw(method, params)
        assert "error" not in answer, answer
        return answer["result"]

    async def hello(self, capabilities: dict[str, Any], **more: Any) -> dict[str, Any]:
        params = {"processId": None, "rootUri": None, "capabilities": capabilities} | more
        result: dict[str, Any] = await self.ask("initialize", params)
        self.notify("initialized", {})
        return result

    async def wait_status(self, state: str, timeout_s: float = 15) -> dict[str, Any]:
        async with asyncio.timeout(timeout_s):
            while True:
                for message in self.notifications:
                    if message["method"] == "albor/status" and message["params"]["state"] == state:
                        found: dict[str, Any] = message["params"]
                        return found
                await asyncio.sleep(0.01)

    def open(self, uri: str, text: str, language: str = "python") -> None:
        document = {"uri": uri, "languageId": language, "version": 0, "text": text}
        self.notify("textDocument/didOpen", {"textDocument": document})

    async def bye(self) -> int:
        await self.ask("shutdown")
        self.notify("exit", None)
        code = await asyncio.wait_for(self.process.wait(), 10)
        await self._reading
        return code

    async def _read(self) -> None:
        assert self.process.stdout is not None
        out = self.process.stdout
        while line := await out.readline():
            size = int(line.split(b":")[1])
            await out.readline()
            message = json.loads(await out.readexactly(size))
            if "method" not in message:
                answer = self._answers.pop(message["id"], None)
                if answer is not None and not answer.done():
                    answer.set_result(message)
                else:
                    self.num_late += 1
            elif "id" in message:
                self.requests.append(message)
                is_configuration = message["method"] == "workspace/configuration"
                result = [self.configuration] if is_configuration else None
                self.send({"id": message["id"], "result": result})
            else:
                self.notifications.append(message)


@contextlib.asynccontextmanager
async def editor(
    folder: Path, server_url: str = "", *arguments: str, **variables: str
) -> AsyncIterator[Editor]:
    """A started albor-lsp with homes of its own; ended at the end if it still runs."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ALBOR", "XDG"))
    }
    environment = kept | {
        "PYTHONPATH": os.pathsep.join([str(LSP_FOLDER), os.environ.get("PYTHONPATH", "")]),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_STATE_HOME": str(folder / "state"),
        "XDG_RUNTIME_DIR": str(folder),
        "ALBOR_SERVER_URL": server_url,
        **variables,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import sys; from albor_lsp.cli import main; sys.exit(main())",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
    )
    talking = Editor(process)
    try:
        yield talking
    finally:
        with contextlib.suppress(ConnectionError, TimeoutError):
            # It ends by itself, so that what it did is counted.
            talking.notify("exit", None)
            async with asyncio.timeout(5):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        await talking._reading


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def gather_within(timeout_s: float, *work: Awaitable[Any]) -> list[Any]:
    async with asyncio.timeout(timeout_s):
        return list(await asyncio.gather(*work))
