"""Whatever comes in, a 4xx in OpenAI's shape that never repeats the input, and the server lives."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albor_serve.api.app import AppSettings
from albor_serve.api.schemas import CompletionBody
from tests.api.live import Live, serving_tiny

URL = "/v1/completions"
SECRET = "hunter2-Zebra"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    app = AppSettings(max_body_bytes=200_000)
    with serving_tiny(tmp_path_factory.mktemp("model"), app) as live:
        yield live


def check_error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert SECRET not in response.text
    assert len(response.text) < 1000
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    return error


def check_alive(http: httpx.Client) -> None:
    answer = http.post(URL, json={"prompt": "a", "max_tokens": 1})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": {"text": SECRET}}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [SECRET, 5]}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [1 << 80]}, "prompt"),
        ({"prompt": SECRET * 1000}, "prompt"),
        ({"prompt": [-1], "echo": True}, "prompt"),
        ({"prompt": [-1], "suffix": "a"}, "prompt"),
        ({"prompt": [1 << 80], "suffix": "a"}, "prompt"),
        ({"prompt": ["a"] * 16, "n": 5}, "n"),
        ({"prompt": ["a", "b"], "suffix": SECRET}, "suffix"),
        ({"suffix": 5}, "suffix"),
        ({"suffix": SECRET, "echo": True}, "echo"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": SECRET}, "max_tokens"),
        ({"max_tokens": 1 << 70}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": SECRET}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 1_000_000_000}, "n"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": [SECRET] * 17}, "stop"),
        ({"stop": [SECRET * 100]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logit_bias": {SECRET: 1}}, "logit_bias"),
        ({"logit_bias": {"5": SECRET}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"5": 10**400}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": SECRET}}, None),
        ({"user": 5}, "user"),
        ({"albor": {"session": ""}}, "albor.session"),
        ({"albor": {"session": SECRET * 100}}, "albor.session"),
        ({"albor": {"deadline_ms": 0}}, "albor.deadline_ms"),
        ({"albor": {"priority": SECRET}}, "albor.priority"),
        ({"albor": []}, "albor"),
        ({"echo": 1}, "echo"),
    ],
)
def test_a_wrong_field_is_named(
    http: httpx.Client, body: dict[str, Any], param: str | None
) -> None:
    error = check_error(http.post(URL, json={"prompt": "a", "max_tokens": 1, **body}))
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    check_alive(http)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 60_000,
        b'{"prompt": ' + b"[" * 60_000 + b"]" * 60_000 + b"}",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "' + SECRET.encode() + b'\n"}',
        b"\x00" * 100,
    ],
)
def test_bodies_that_are_not_json(http: httpx.Client, data: bytes) -> None:
    check_error(http.post(URL, content=data))
    check_alive(http)


def test_lone_surrogates_and_nul_are_text(http: httpx.Client) -> None:
    for text in (r"\ud800", r"a\u0000b", r"\udfff\ud800"):
        data = f'{{"prompt": "{text}", "suffix": "{text}", "max_tokens": 1}}'.encode()
        assert http.post(URL, content=data).status_code == 200


def test_unknown_fields_are_tolerated(http: httpx.Client) -> None:
    body = {"prompt": "a", "max_tokens": 1, "whatever": SECRET, "albor": {"later": 1}}
    assert http.post(URL, json=body).status_code == 200


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    error = check_error(http.post(URL, json={"prompt": "a", "model": SECRET}), 404)
    assert error["code"] == "model_not_found"


def test_unknown_urls_and_methods(http: httpx.Client) -> None:
    check_error(http.get(f"/{SECRET}"), 404)
    check_error(http.get(URL), 405)
    assert http.get(URL).headers["allow"] == "POST"


def test_a_body_that_is_too_large_is_refused_unread(live: Live, http: httpx.Client) -> None:
    check_error(http.post(URL, json={"prompt": SECRET * 20_000}), 413)

    def chunks() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 1000

    check_error(http.post(URL, content=chunks()), 413)
    declared = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
    assert b" 413 " in talk(live, declared.encode())
    check_alive(http)


def test_raw_bytes_on_the_socket_do_no_harm(live: Live, http: httpx.Client) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST " + URL.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ):
        answer = talk(live, data)
        assert b" 500 " not in answer.split(b"\r\n", 1)[0]
    check_alive(http)


def talk(live: Live, data: bytes) -> bytes:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(data)
        sock.settimeout(2)
        try:
            return sock.recv(4096)
        except (TimeoutError, ConnectionError):
            return b""


def test_pages_of_other_sites_are_refused(http: httpx.Client) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for headers in (
        {"host": "evil.example"},
        {"host": "localhost.evil.example:8080"},
        {"origin": "https://evil.example"},
        {"origin": "http://localhost.evil.example"},
        {"origin": "null"},
    ):
        check_error(http.post(URL, json=body, headers=headers), 403)
    for headers in ({"host": "localhost:1"}, {"origin": "http://127.0.0.1:3000"}):
        assert http.post(URL, json=body, headers=headers).status_code == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(set(CompletionBody.model_fields) - {"max_tokens"}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(FIELDS, JSON, max_size=4))
def test_no_json_makes_the_server_fail(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"prompt": "a", **fields, "max_tokens": 2}
    response = http.post(URL, content=json.dumps(body).encode())
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
