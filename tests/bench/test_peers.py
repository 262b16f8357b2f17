"""Peers as processes: servers, workers, their clocks and their ends."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from albor_serve.backends.thread_governor import CpuTimes
from albor_serve.bench.load import LoadMeter
from albor_serve.bench.peers import (
    NO_FLASH,
    AlborServer,
    LlamaServer,
    Peer,
    PeerOptions,
    Run,
    Worker,
    open_peer,
    stream_completion,
)
from albor_serve.bench.shapes import shape_gguf
from albor_serve.bench.worker import enabled_features
from albor_serve.config import ModelConfig
from albor_serve.errors import BackendError, ConfigError

TINY = ModelConfig("llama", 512, 64, 128, 2, 4, 2, 16, 256, tie_embeddings=True)
OPTIONS = PeerOptions(context=128, threads=1)
TOKENS = list(range(300, 340))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape_gguf("tiny", TINY, tmp_path_factory.mktemp("shapes"))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("kind", ["albor", "albor-backend", "albor+http"])
def test_a_peer_makes_the_tokens_asked_for_and_ends_with_its_process(kind: str, gguf: Path) -> None:
    with open_peer(kind, gguf, OPTIONS) as peer:
        assert peer.kind == kind
        for fresh in (True, False):
            run = peer.generate(TOKENS, 6, fresh=fresh)
            assert run.num_tokens == 6
            assert run.first_token_ms > 0
            assert run.decode_ms > 0
        assert peer.rss_bytes() > 10e6
        assert peer.cpu_seconds() > 0
        pid = peer.pid
        assert is_running(pid)
    assert not is_running(pid)


def test_a_worker_tells_why_it_ended(tmp_path: Path) -> None:
    missing = tmp_path / "none.gguf"
    for kind in ("albor", "albor+http"):
        with pytest.raises(BackendError, match=r"none\.gguf") as caught:
            open_peer(kind, missing, OPTIONS)
        assert "\n" not in str(caught.value)


def test_a_worker_that_was_killed_is_an_error(gguf: Path) -> None:
    with Worker("albor-backend", gguf, OPTIONS) as peer:
        os.kill(peer.pid, 9)
        with pytest.raises(BackendError, match="albor-backend ended"):
            peer.generate(TOKENS, 2, fresh=True)


class Script(BaseHTTPRequestHandler):
    """Answers with what the test put on the server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, ScriptServer)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(server.answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class ScriptServer(ThreadingHTTPServer):
    status = 200
    answer = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Script)
        self.bodies: list[dict[str, object]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[ScriptServer]:
    with ScriptServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def events(*values: object) -> bytes:
    return b"".join(b"data: " + json.dumps(v).encode() + b"\n\n" for v in values)


def choice(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"text": text, "finish_reason": reason}]}


def test_a_stream_is_timed_from_its_first_text(server: ScriptServer) -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    server.answer = (
        events(choice(""), choice("a"), choice("b", "length"), usage) + b"data: [DONE]\n\n"
    )
    run = stream_completion(server.address, [1, 2], 3, fresh=True)
    assert run.num_tokens == 3
    assert 0 <= run.decode_ms <= run.first_token_ms
    [body] = server.bodies
    assert body["prompt"] == [1, 2]
    assert body["ignore_eos"] is True
    assert body["temperature"] == 0
    assert body["cache_prompt"] is False


@pytest.mark.parametrize(
    ("status", "answer", "says"),
    [
        (503, b"", "answered 503"),
        (200, b"", "no text"),
        (200, b"data: {not json\n\n", "broke off"),
        (200, events({"choices": [{}]}), "broke off"),
    ],
)
def test_a_bad_stream_is_one_error(
    server: ScriptServer, status: int, answer: bytes, says: str
) -> None:
    server.status, server.answer = status, answer
    with pytest.raises(BackendError, match=says):
        stream_completion(server.address, [1], 2, fresh=False)


def test_a_closed_port_is_one_error() -> None:
    with pytest.raises(BackendError, match="broke off"):
        stream_completion("127.0.0.1:9", [1], 2, fresh=False)


FAKE_LLAMA_SERVER = """\
#!{python}
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = body.get("n_predict") or body["max_tokens"]
        timings = {{"prompt_ms": 7.0, "predicted_ms": 20.0, "predicted_n": count}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"timings": timings}}).encode())
    def log_message(self, *args):
        pass
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert arguments["--ctx-size"] == "128" and arguments["--threads"] == "1"
assert arguments["--parallel"] == "1"
assert arguments.get("--flash-attn") == {flash}
http.server.HTTPServer(("127.0.0.1", int(arguments["--port"])), Handler).serve_forever()
"""


def program(folder: Path, text: str, flash: str | None = None) -> Path:
    path = folder / "llama-server"
    path.write_text(text.format(python=sys.executable, flash=repr(flash)))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("kind", "flash"), [("llama-server", None), (NO_FLASH, "off")])
def test_a_program_of_ones_own_is_started_and_asked_for_its_own_times(
    kind: str, flash: str | None, gguf: Path, tmp_path: Path
) -> None:
    path = program(tmp_path, FAKE_LLAMA_SERVER, flash)
    options = PeerOptions(128, 1, llama_server=path)
    with open_peer(kind, gguf, options) as peer:
        assert isinstance(peer, LlamaServer)
        assert peer.generate(TOKENS, 5, fresh=True) == Run(7.0, 5.0, 5)
        pid = peer.pid
    assert not is_running(pid)


def test_a_program_that_cannot_run_is_told(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot run"):
        open_peer("llama-server", gguf, PeerOptions(128, 1, llama_server=tmp_path / "none"))
    failing = program(tmp_path, "#!{python}\nimport sys\nsys.exit('bad flag')\n")
    with pytest.raises(BackendError, match="bad flag"):
        open_peer("llama-server", gguf, PeerOptions(128, 1, llama_server=failing))


def test_kinds_open_what_their_names_say(gguf: Path) -> None:
    with open_peer("albor+http", gguf, OPTIONS) as peer:
        assert isinstance(peer, AlborServer)


@pytest.mark.parametrize("kind", ["llama-server", NO_FLASH, "llama-server+http"])
def test_llama_server_inside_the_package_answers(kind: str, gguf: Path) -> None:
    pytest.importorskip("xllamacpp")
    with open_peer(kind, gguf, OPTIONS) as peer:
        assert peer.generate(TOKENS, 6, fresh=True).num_tokens == 6
        assert peer.generate(TOKENS, 6, fresh=False).num_tokens == 6
        assert "AVX" in peer.build or "NEON" in peer.build


def test_features_are_read_from_llama_cpps_line() -> None:
    assert enabled_features(b"CPU : AVX = 1 | AVX2 = 0 | FMA = 1 | ") == "AVX FMA"


class Fake(Peer):
    """CPU time as the test says."""

    pid = 0

    def __init__(self, kind: str, cpu: Sequence[float]) -> None:
        super().__init__(kind)
        self._cpu = iter(cpu)

    def generate(self, tokens: Sequence[int], num_new: int, *, fresh: bool) -> Run:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def cpu_seconds(self) -> float:
        return next(self._cpu)


def test_the_meter_tells_other_programs_from_idle_peers() -> None:
    # A 2-second turn in which the CPUs worked 3.5 s: 2 for the active peer, 0.2 for the idle one,
    # 0.1 for the benchmark itself, so 1.2 for others.
    active, idle = Fake("a", [10.0, 12.0]), Fake("b", [5.0, 5.2])
    times = iter([CpuTimes(0, 100.0, 1.0, 2, 1), CpuTimes(2, 103.5, 1.1, 2, 1)])
    clock = iter([50.0, 52.0])
    meter = LoadMeter([active, idle], lambda: next(times), lambda: next(clock))
    with meter.turn(active):
        pass
    assert meter.foreign_cores == [pytest.approx(0.6)]
    assert meter.idle_cores(idle) == pytest.approx(0.1)
    assert meter.idle_cores(active) == 0.0


def test_the_meter_says_nothing_of_turns_too_short_or_systems_that_do_not_tell() -> None:
    clock = iter([0.0, 0.1, 0.0, 5.0])
    times = iter([CpuTimes(0, 1.0, 0.0, 2, 1), CpuTimes(0, 2.0, 0.0, 2, 1), None, None])
    peer = Fake("a", [0.0] * 4)
    meter = LoadMeter([peer], lambda: next(times), lambda: next(clock))
    for _ in range(2):
        with meter.turn(peer):
            pass
    assert meter.foreign_cores == []
