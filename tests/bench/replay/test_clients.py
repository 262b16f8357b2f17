"""The clients against servers that answer as told."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from albor_serve.bench.replay.clients.base import Client, EditorState, Ghost
from albor_serve.bench.replay.clients.http import post_json
from albor_serve.bench.replay.clients.llama_vim import LlamaVimClient
from albor_serve.bench.replay.clients.lsp import LspClient, position
from albor_serve.bench.replay.clients.plain import ALBOR, LLAMA_SERVER, PlainClient, window
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.scenes import Source
from albor_serve.errors import BackendError, ConfigError

TIMINGS = {"prompt_n": 3, "cache_n": 97, "predicted_n": 5}


class Server:
    """Answers each POST by a function of its body and keeps the bodies."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = lambda body: (200, {})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append((self.path, body))
                status, value = outer.answer(body)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def state(before: str, version: int = 0, after: str = "\n") -> EditorState:
    return EditorState("demo.py", before, after, version)


def watch(client: Client) -> list[Ghost]:
    shown: list[Ghost] = []
    client.on_ghost = shown.append
    return shown


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_plain_asks_once_after_the_debounce(server: Server) -> None:
    server.answer = lambda body: (200, {"content": "42", "timings": TIMINGS})

    async def run() -> None:
        async with Clock(skip_idle=True) as clock:
            client = PlainClient("plain", server.address, LLAMA_SERVER, clock)
            shown = watch(client)
            await client.open(state(""), ())
            for version, text in enumerate(("x", "x =", "x = ")):
                client.on_text(state(text, version))
            await until(lambda: shown)
            await client.close_scene()
            assert shown == [Ghost(2, "42")]
            assert clock.now() >= 0.35
            assert client.work.num_requests == 1
            [record] = client.work.answers
            assert (record.num_prompt, record.num_new_prompt, record.num_decoded) == (100, 3, 5)

    asyncio.run(run())
    [(path, body)] = server.bodies
    assert path == "/completion"
    assert body["prompt"] == "<|fim_prefix|><|fim_suffix|>\n<|fim_middle|>x = "


def test_plain_stops_at_the_line_where_code_follows(server: Server) -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    server.answer = lambda body: (200, {"choices": [{"text": "a"}], "usage": usage})

    async def run() -> None:
        async with Clock(skip_idle=True) as clock:
            client = PlainClient("plain", server.address, ALBOR, clock, 0.0, "me")
            shown = watch(client)
            client.on_text(state("f(", 1, ", b)\n"))
            await until(lambda: shown)
            assert client.work.answers[0].num_new_prompt == 1
            await client.close_scene()

    asyncio.run(run())
    [(path, body)] = server.bodies
    assert (path, body["stop"], body["albor"]) == ("/v1/completions", ["\n"], {"session": "me"})


def test_a_refusal_ends_the_scene_with_an_error(server: Server) -> None:
    server.answer = lambda body: (400, {"error": "no"})

    async def run() -> None:
        async with Clock(skip_idle=True) as clock:
            client = PlainClient("plain", server.address, ALBOR, clock, 0.0)
            client.on_text(state("x"))
            await until(lambda: server.bodies)
            await asyncio.sleep(0.1)
            with pytest.raises(BackendError, match="400"):
                await client.close_scene()

    asyncio.run(run())


def test_nobody_there() -> None:
    with pytest.raises(BackendError, match="broke off"):
        asyncio.run(post_json("127.0.0.1:9", "/completion", {}))


def test_the_window_is_whole_lines() -> None:
    text = "".join(f"line {at}\n" for at in range(1000))
    before, after = window(state(text, 0, text))
    assert before.startswith("line ")
    assert text.endswith(before)
    assert text.startswith(after)
    assert after.endswith("\n")


def test_llama_vim_answers_agreeing_keys_from_its_cache(server: Server) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        text = "alue = 1" if body["prompt"].endswith(">v") else ""
        return 200, {"content": text, "timings": TIMINGS}

    server.answer = answer

    async def run() -> None:
        async with Clock(skip_idle=True) as clock:
            client = LlamaVimClient("vim", server.address, clock)
            shown = watch(client)
            await client.open(state(""), ())
            client.on_text(state("v", 1))
            await until(lambda: shown)
            # What would follow its acceptance is asked for, once.
            await until(lambda: len(server.bodies) == 2)
            assert server.bodies[1][1]["prompt"].endswith(">value = 1")
            client.on_text(state("va", 2))
            assert shown[-1] == Ghost(2, "lue = 1")
            await asyncio.sleep(0.05)
            assert len(server.bodies) == 2
            await client.close_scene()

    asyncio.run(run())


def test_llama_vim_waits_for_the_request_in_flight_and_spares_long_tails(server: Server) -> None:
    release = threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        release.wait(10)
        return 200, {"content": "", "timings": TIMINGS}

    server.answer = answer

    async def run() -> None:
        async with Clock(skip_idle=True) as clock:
            client = LlamaVimClient("vim", server.address, clock)
            await client.open(state(""), ())
            client.on_text(state("a", 1))
            await until(lambda: server.bodies)
            client.on_text(state("ab", 2))
            client.on_text(state("abc", 3, " and much more\n"))
            await asyncio.sleep(0.05)
            assert len(server.bodies) == 1
            client.on_text(state("abcd", 4))
            release.set()
            await until(lambda: len(server.bodies) == 2)
            assert server.bodies[1][1]["prompt"].endswith(">abcd")
            await client.close_scene()

    asyncio.run(run())


def test_llama_vim_warms_the_server_in_the_layout_that_the_model_knows(server: Server) -> None:
    server.answer = lambda body: (200, {"content": "", "timings": TIMINGS})

    other = Source("demo", "1", "MIT", "other.py", "", "a = 1\n")

    async def run() -> None:
        async with Clock(skip_idle=True) as clock:
            await LlamaVimClient("vim", server.address, clock).open(state("x"), [other])

    asyncio.run(run())
    [(path, body)] = server.bodies
    assert path == "/completion"
    assert body["n_predict"] == 0
    assert body["prompt"].startswith("<|fim_prefix|><|fim_suffix|>")
    assert body["prompt"].endswith("<|fim_middle|>x")


LANGUAGE_SERVER = """
import json, os, sys
text = ""
log = open(sys.argv[1], "w")
def send(message):
    data = json.dumps({"jsonrpc": "2.0", **message}).encode()
    sys.stdout.buffer.write(b"Content-Length: %d\\r\\n\\r\\n" % len(data) + data)
    sys.stdout.buffer.flush()
while True:
    head = sys.stdin.buffer.readline()
    if not head:
        break
    sys.stdin.buffer.readline()
    message = json.loads(sys.stdin.buffer.read(int(head.split(b":")[1])))
    method, params = message.get("method"), message.get("params")
    print(json.dumps([method, params]), file=log, flush=True)
    result = None
    if method == "initialize":
        send({"id": 99, "method": "workspace/configuration", "params": {"items": [{}, {}]}})
        result = {"capabilities": {}}
    if method == "textDocument/inlineCompletion":
        latency = {"num_prompt_tokens": 100, "num_cached_tokens": 97, "num_new_tokens": 5}
        for source in ("computed", "cached", "computed"):
            send({"method": "albor/status", "params": {"source": source, "latency": latency}})
        at = params["position"]
        start = {"line": at["line"], "character": at["character"] - 1}
        result = {"items": [{"insertText": "=1", "range": {"start": start, "end": at},
                             "command": {"title": "", "command": "accepted", "arguments": [7]}}]}
    if method == "exit":
        break
    if method is None:
        print(json.dumps(["reply", message["result"]]), file=log, flush=True)
    elif "id" in message:
        send({"id": message["id"], "result": result})
print(json.dumps(["url", os.environ["ALBOR_SERVER_URL"]]), file=log, flush=True)
"""


def test_the_language_server_is_asked_as_vs_code_asks(tmp_path: Path) -> None:
    program, log = tmp_path / "server.py", tmp_path / "log"
    program.write_text(LANGUAGE_SERVER)

    async def run() -> None:
        async with Clock(skip_idle=True) as clock:
            command = (sys.executable, str(program), str(log))
            client = LspClient("ours", "127.0.0.1:1", clock, command, {"cache": False})
            await client.start()
            shown = watch(client)
            await client.open(state("a\n🐍 "), ())
            client.on_text(state("a\n🐍 =", 1))
            await until(lambda: shown)
            assert shown == [Ghost(1, "1")]
            [record] = client.work.answers
            assert (record.num_prompt, record.num_new_prompt, record.num_decoded) == (100, 3, 5)
            client.on_accept(state("a\n🐍 =1", 2))
            await until(lambda: "accepted" in log.read_text())
            await client.close_scene()
            assert client.cpu_seconds() > 0
            await client.stop()

    asyncio.run(run())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    methods = [method for method, _ in lines]
    assert methods.count("textDocument/didChange") == 2
    change = next(params for method, params in lines if method == "textDocument/didChange")
    at = {"line": 1, "character": 3}
    assert change["contentChanges"] == [{"range": {"start": at, "end": at}, "text": "="}]
    assert ["reply", [{"cache": False}] * 2] in lines
    assert ["workspace/executeCommand", {"command": "accepted", "arguments": [7]}] in lines
    assert lines[-1] == ["url", "http://127.0.0.1:1"]


def test_a_language_server_that_ends_or_is_missing() -> None:
    async def start(*command: str) -> None:
        client = LspClient("ours", "127.0.0.1:1", Clock(), command, {})
        try:
            await client.start()
        finally:
            await client.stop()

    with pytest.raises(BackendError, match="ended"):
        asyncio.run(start(sys.executable, "-c", "pass"))
    with pytest.raises(ConfigError, match="cannot run"):
        asyncio.run(start("/no/such/program"))


def test_positions_count_utf16() -> None:
    assert position("a\nb🐍é") == {"line": 1, "character": 4}
