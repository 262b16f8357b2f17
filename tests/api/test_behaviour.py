"""Cancelling, failing and waiting over HTTP, with a backend whose speed the test controls."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from albor_serve.api.app import AppSettings
from albor_serve.config import EngineConfig
from tests.api.live import Live, serving_backend
from tests.fakes import ByteTokenizer, HashBackend

URL = "/v1/completions"
TOKENIZER = ByteTokenizer()


class Slow:
    """A server over a slow backend."""

    def __init__(self, live: Live, backend: HashBackend) -> None:
        self.live, self.backend = live, backend
        self.http = httpx.Client(base_url=live.url, timeout=30)

    def idle(self) -> bool:
        stats = self.live.engine.stats()
        return not stats.num_running and not stats.num_waiting


@pytest.fixture
def slow() -> Iterator[Slow]:
    backend = HashBackend(TOKENIZER.vocab_size, num_slots=2, max_seq_len=4096, ms_per_token=2.0)
    # A step ends well within health_timeout_s, on a busy machine too.
    config = EngineConfig(num_slots=2, max_seq_len=4096, max_queue_len=1, prefill_chunk_len=32)
    settings = AppSettings(keep_alive_s=0.2, health_timeout_s=0.3, body_s=0.5)
    with serving_backend(backend, TOKENIZER, config, settings) as live:
        slow = Slow(live, backend)
        yield slow
        slow.http.close()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)


def long_body(**extra: object) -> dict[str, object]:
    return {"prompt": "a", "max_tokens": 3000, "temperature": 0, "ignore_eos": True, **extra}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_stops_the_engine(slow: Slow, streamed: bool) -> None:
    data = json.dumps(long_body(stream=streamed)).encode()
    host, port = slow.live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        until(lambda: slow.live.engine.stats().num_running == 1)
    began = time.monotonic()
    until(slow.idle)
    assert time.monotonic() - began < 2
    assert slow.live.engine.stats().num_cancelled == 1


def test_a_newer_request_of_a_session_ends_the_older(slow: Slow) -> None:
    answers: list[httpx.Response] = []

    def old() -> None:
        answers.append(slow.http.post(URL, json=long_body(albor={"session": "s"})))

    thread = threading.Thread(target=old)
    thread.start()
    until(lambda: slow.live.engine.stats().num_running == 1)
    new = {"prompt": "b", "max_tokens": 2, "albor": {"session": "s"}}
    assert httpx.post(slow.live.url + URL, json=new).status_code == 200
    thread.join(10)
    assert answers[0].status_code == 409
    assert answers[0].json()["error"]["code"] == "superseded"


def test_a_superseded_stream_ends_with_an_error_and_done(slow: Slow) -> None:
    body = long_body(stream=True, albor={"session": "s"})
    with slow.http.stream("POST", URL, json=body) as response:
        lines = response.iter_lines()
        first = next(lines)
        new = {"prompt": "b", "max_tokens": 1, "albor": {"session": "s"}}
        assert httpx.post(slow.live.url + URL, json=new).status_code == 200
        rest = [line for line in lines if line]
    assert json.loads(first.removeprefix("data: "))["choices"]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "superseded"
    assert rest[-1] == "data: [DONE]"


def test_a_stream_that_waits_is_kept_alive(slow: Slow) -> None:
    slow.backend.ms_per_token = 10.0
    body = {"prompt": "x" * 80, "max_tokens": 1, "stream": True}
    with slow.http.stream("POST", URL, json=body) as response:
        text = response.read().decode()
    assert text.startswith(": ")
    assert text.endswith("data: [DONE]\n\n")


def test_a_full_queue_is_503_with_retry_after(slow: Slow) -> None:
    def fill() -> None:
        with httpx.stream("POST", slow.live.url + URL, json=long_body(stream=True)) as response:
            for _ in response.iter_lines():
                if stop.is_set():
                    return

    stop = threading.Event()
    threads = [threading.Thread(target=fill) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: slow.live.engine.stats().num_running == 2)
    waiting = threading.Thread(
        target=lambda: slow.http.post(URL, json={"prompt": "c", "max_tokens": 1})
    )
    waiting.start()
    until(lambda: slow.live.engine.stats().num_waiting == 1)
    refused = httpx.post(slow.live.url + URL, json={"prompt": "d", "max_tokens": 1})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    # Full of answers that get on is busy, not broken.
    assert httpx.get(slow.live.url + "/health").status_code == 200
    stop.set()
    for thread in (*threads, waiting):
        thread.join(10)
    until(slow.idle)


def test_a_failure_before_the_first_token_has_its_real_status(slow: Slow) -> None:
    slow.backend.fail_on = lambda steps: True
    for streamed in (False, True):
        response = slow.http.post(URL, json={"prompt": "a", "stream": streamed})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "backend_error"


def test_a_failure_in_mid_stream_is_an_error_object_and_done(slow: Slow) -> None:
    slow.backend.fail_on = lambda steps: len(slow.backend.calls) > 5
    with slow.http.stream("POST", URL, json=long_body(stream=True)) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert lines[-1] == "data: [DONE]"


def test_health_tells_a_dead_backend(slow: Slow) -> None:
    assert slow.http.get("/health").status_code == 200
    slow.backend.fail_rewind = True
    slow.backend.fail_on = lambda steps: True
    assert slow.http.post(URL, json={"prompt": "a"}).status_code == 500
    health = slow.http.get("/health")
    assert health.status_code == 503
    assert health.json()["error"]["message"]
    assert slow.http.post(URL, json={"prompt": "a"}).status_code == 500


def test_health_tells_a_stuck_backend_and_asks_it_once(slow: Slow) -> None:
    slow.backend.ms_per_token = 2000.0
    answers: list[int] = []

    def ask() -> None:
        answers.append(httpx.get(slow.live.url + "/health", timeout=20).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == [503] * 4
    assert slow.live.engine.stats().num_requests == 1


def test_a_deadline_gives_the_text_so_far(slow: Slow) -> None:
    body = long_body(albor={"deadline_ms": 100})
    choice = slow.http.post(URL, json=body).json()["choices"][0]
    assert choice["text"]
    assert choice["finish_reason"] == "length"


def test_a_bug_is_a_500_without_details(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("hunter2")

    monkeypatch.setattr(type(slow.live.engine), "submit", broken)
    response = slow.http.post(URL, json={"prompt": "a"})
    assert response.status_code == 500
    assert "hunter2" not in response.text
    assert response.json()["error"]["code"] == "backend_error"


def test_health_is_well_while_a_long_prompt_is_read(slow: Slow) -> None:
    slow.backend.ms_per_token = 0.5
    # Two prompts fill both slots, so that the probe waits far longer than health_timeout_s.
    bodies = [{"prompt": letter * 3000, "max_tokens": 1} for letter in "xy"]
    threads = [
        threading.Thread(target=slow.http.post, args=(URL,), kwargs={"json": body})
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    until(lambda: slow.live.engine.stats().num_running == 2)
    assert httpx.get(slow.live.url + "/health", timeout=20).status_code == 200
    assert slow.live.engine.stats().num_running == 2
    for thread in threads:
        thread.join(20)


def test_a_body_that_trickles_in_is_408_and_stalls_nobody(slow: Slow) -> None:
    host, port = slow.live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        sock.sendall(head.encode())
        sock.settimeout(0.05)
        answer = b""
        began = time.monotonic()
        while not answer and time.monotonic() - began < 5:
            sock.sendall(b" ")
            assert slow.http.get("/v1/models").status_code == 200
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(4096)
        waited = time.monotonic() - began
        sock.settimeout(5)
        # Head and body may come in two segments.
        with contextlib.suppress(ConnectionResetError):
            while b"body_timeout" not in answer and (rest := sock.recv(4096)):
                answer += rest
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in answer
    assert waited < 2
