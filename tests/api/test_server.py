"""Listening, loading and draining: processes of their own, real sockets, real signals."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from albor_serve.api.server import bind
from albor_serve.errors import ConfigError

ROOT = Path(__file__).parents[2]

# A server whose loading waits for a line on stdin and whose model needs 20 ms for each token.
SCRIPT = """
import sys, threading
from albor_serve.api.server import Ready, bind, serve
from albor_serve.errors import CheckpointError

def start(stop):
    lines = []
    reader = threading.Thread(target=lambda: lines.append(sys.stdin.readline()), daemon=True)
    reader.start()
    while not lines:
        if stop.wait(0.01):
            print("stopped", flush=True)
            raise KeyboardInterrupt
    if lines[0] == "broken\\n":
        raise CheckpointError("no such model")
    from albor_serve.api.app import create_app
    from albor_serve.api.completion import ServedModel
    from albor_serve.config import EngineConfig
    from albor_serve.engine import Engine
    from tests.fakes import ByteTokenizer, HashBackend
    tokenizer = ByteTokenizer()
    speed = 0.0 if lines[0] == "fast\\n" else 20.0
    backend = HashBackend(tokenizer.vocab_size, 2, 4096, ms_per_token=speed)
    engine = Engine(backend, tokenizer, EngineConfig(num_slots=2, max_seq_len=4096))
    engine.start()
    app = create_app(ServedModel("fake", engine, None))
    return Ready(app, lambda s: engine.close(drain_s=s), lambda: print("ready", flush=True))

sock = bind("127.0.0.1", 0)
print(sock.getsockname()[1], flush=True)
try:
    serve(sock, start)
except CheckpointError as error:
    sys.exit(f"failed: {error}")
"""


class Process:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = f"http://127.0.0.1:{self.read()}"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.process.kill()
    process.process.communicate()


def test_while_loading_every_url_is_503_then_the_app_answers(process: Process) -> None:
    for method, path in (("GET", "/health"), ("POST", "/v1/completions"), ("GET", "/nowhere")):
        answer = httpx.request(method, process.url + path, timeout=30)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "loading"
    process.tell("go")
    assert process.read() == "ready"
    assert httpx.get(f"{process.url}/health").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_stops_the_loading(process: Process, number: int) -> None:
    httpx.get(process.url, timeout=30)
    process.process.send_signal(number)
    assert process.read() == "stopped"
    assert process.end() == (0, "")


def test_a_failed_load_ends_the_server_with_its_error(process: Process) -> None:
    process.tell("broken")
    assert process.end() == (1, "failed: no such model\n")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_answers_at_once_but_whole(process: Process, second: int) -> None:
    process.tell("go")
    assert process.read() == "ready"
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{process.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        began = time.monotonic()
        process.process.send_signal(second)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert error["code"] == "shutting_down"
    assert process.end() == (0, "")
    assert time.monotonic() - began < 5  # the drain alone would take 10 s


def test_a_client_that_never_reads_does_not_hold_up_the_end(process: Process) -> None:
    process.tell("fast")
    assert process.read() == "ready"
    host, port = process.url.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "prompt": "a",
            "max_tokens": 4000,
            "n": 2,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 20,
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(f"{head}\r\n{body}".encode())
        time.sleep(2)  # what fits into the buffers has been sent
        began = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == (0, "")
        assert time.monotonic() - began < 8  # 2.5 s on an idle machine


def test_two_servers_never_share_a_port() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match="choose another with --port"):
            bind("127.0.0.1", port)
        # Nobody accepts yet, but a client may already connect.
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("", 0, "--host is empty"),
        ("127.0.0.1", -1, "--port is -1"),
        ("127.0.0.1", 65536, "--port is 65536"),
        ("203.0.113.1", 0, "with --host"),
        ("a..b", 0, "with --host"),
        ("x" * 300, 0, "with --host"),
    ],
)
def test_impossible_addresses(host: str, port: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        bind(host, port)


def test_answers_leave_without_waiting_for_acknowledgements() -> None:
    async def option_of_an_accepted_connection() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind("127.0.0.1", 0) as sock:
            port = sock.getsockname()[1]
            async with await asyncio.start_server(accepted, sock=sock):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                option = await found
                writer.close()
                await writer.wait_closed()
                return option

    assert asyncio.run(option_of_an_accepted_connection()) != 0
