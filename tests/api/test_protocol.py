"""Connections that send little, nothing, or come in crowds."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from albor_serve.api import limits
from tests.api.live import Live, serving_tiny


@pytest.fixture
def live(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Live]:
    monkeypatch.setattr(limits, "HEADER_S", 0.5)
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 20)
    with serving_tiny(tmp_path_factory.mktemp("model")) as live:
        yield live


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def closes_within(sock: socket.socket, seconds: float, trickle: bytes = b"") -> bool:
    deadline = time.monotonic() + seconds
    sock.settimeout(0.05)
    while time.monotonic() < deadline:
        try:
            if trickle:
                sock.sendall(trickle)
            if not sock.recv(4096):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_a_connection_that_sends_nothing_is_closed(live: Live) -> None:
    with connect(live) as sock:
        assert closes_within(sock, 3)


def test_a_head_that_trickles_in_is_closed(live: Live) -> None:
    with connect(live) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        assert closes_within(sock, 3, b"a")


def test_a_second_head_is_timed_as_well(live: Live) -> None:
    with connect(live) as sock:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET ")
        assert closes_within(sock, 3, b"a")


def test_a_body_that_goes_on_after_its_refusal_is_closed(live: Live) -> None:
    with connect(live) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 99999\r\n\r\n"
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 403")
        assert closes_within(sock, 3, b"a")


def test_a_long_answer_is_not_cut(live: Live) -> None:
    body = {"prompt": "a", "max_tokens": 200, "n": 16, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as response:
        lines = []
        for line in response.iter_lines():
            if not lines:
                time.sleep(0.8)
            lines.append(line)
    assert "data: [DONE]" in lines


def test_a_crowd_is_refused_and_the_next_is_served(live: Live) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connect(live))
        time.sleep(0.1)
        assert len(live.served.name) > 0
        with connect(live) as sock:
            assert closes_within(sock, 0.4)
    assert httpx.get(f"{live.url}/health", timeout=30).status_code == 200
