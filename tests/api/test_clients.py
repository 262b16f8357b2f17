"""Requests as other people's plugins send them, and their answers as those read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from albor_serve.api.app import AppSettings
from albor_serve.api.schemas import TABBY_MAX_TOKENS
from tests.api.live import Live, serving_tiny

PREFIX = "def add(first, second):\n    return "
SUFFIX = "\n\n\nprint(add(1, 2))\n"


def streamed(
    http: httpx.Client, path: str, body: dict[str, Any], text_of: Callable[[Any], str | None]
) -> str:
    """What a plugin that reads lines of `data: {...}` puts together."""
    text = ""
    headers = {"Authorization": "Bearer TERM", "Accept": "application/json"}
    with http.stream("POST", path, json=body, headers=headers) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                text += text_of(json.loads(line[6:])) or ""
    return text


def plain(http: httpx.Client, **more: Any) -> str:
    """The same question in OpenAI's words."""
    body = {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 12, "temperature": 0} | more
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_minuets_openai_fim_compatible(http: httpx.Client) -> None:
    body = {
        "model": "default",
        "prompt": PREFIX,
        "suffix": SUFFIX,
        "stream": True,
        "max_tokens": 12,
        "top_p": 0.9,
        "temperature": 0,
        "stop": ["\n\n"],
    }
    text = streamed(http, "/v1/completions", body, lambda event: event["choices"][0]["text"])
    assert text == plain(http, stop=["\n\n"], top_p=0.9)


@pytest.mark.parametrize("stream", [True, False])
def test_minuets_and_continues_codestral(http: httpx.Client, stream: bool) -> None:
    body = {
        "model": "default",
        "prompt": PREFIX,
        "suffix": SUFFIX,
        "max_tokens": 12,
        "temperature": 0,
        "top_p": 1,
        "stop": ["\n\n", "/src/", "```"],
        "stream": stream,
    }
    if stream:
        text = streamed(
            http,
            "/v1/fim/completions",
            body,
            lambda event: event["choices"][0]["delta"].get("content"),
        )
    else:
        answer = http.post("/v1/fim/completions", json=body).json()
        text = answer["choices"][0]["message"]["content"]
    assert text == plain(http, stop=["\n\n", "/src/", "```"])


def test_continues_llama_cpp(http: httpx.Client) -> None:
    body = {
        "prompt": PREFIX,
        "n_predict": 12,
        "frequency_penalty": None,
        "presence_penalty": None,
        "min_p": None,
        "mirostat": None,
        "stop": ["\n\n"],
        "top_k": 1,
        "top_p": None,
        "temperature": 0.01,
        "stream": True,
        "raw": True,
    }
    text = streamed(http, "/completion", body, lambda event: event["content"])
    wanted = http.post(
        "/v1/completions",
        json={"prompt": PREFIX, "max_tokens": 12, "temperature": 0, "stop": ["\n\n"]},
    )
    assert text == wanted.json()["choices"][0]["text"]


def tabby(http: httpx.Client, segments: dict[str, Any], **more: Any) -> httpx.Response:
    body = {"language": "python", "segments": segments, "user": "u-1", "mode": "standard"} | more
    return http.post("/v1/completions", json=body)


def test_tabbys_segments(http: httpx.Client) -> None:
    snippet = {"filepath": "b.py", "body": "def b():\n    return 1\n", "score": 0.5}
    segments = {
        "prefix": PREFIX,
        "suffix": SUFFIX,
        "filepath": "a.py",
        "git_url": "https://example.org/a.git",
        "declarations": [{"filepath": "c.py", "body": "C = 1\n"}],
        "relevant_snippets_from_changed_files": [snippet],
        "relevant_snippets_from_recently_opened_files": None,
        "clipboard": "x",
    }
    answer = tabby(http, segments, temperature=0.0).json()
    assert answer["id"]
    assert answer["choices"][0]["index"] == 0
    options = {
        "path": "a.py",
        "extra_context": [
            {"path": "c.py", "text": "C = 1\n"},
            {"path": "b.py", "text": "def b():\n    return 1\n"},
        ],
    }
    wanted = plain(http, max_tokens=TABBY_MAX_TOKENS, albor=options)
    assert answer["choices"][0]["text"] == wanted


def test_tabbys_segments_fit_whatever_their_size(http: httpx.Client, live: Live) -> None:
    answer = tabby(http, {"prefix": "x = 1\n" * 500}, max_tokens=4)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] <= live.engine.max_seq_len
    assert usage["completion_tokens"] <= 4


@pytest.mark.parametrize(
    ("segments", "more", "param"),
    [
        ({"suffix": "a"}, {}, "segments.prefix"),
        ({"prefix": 1}, {}, "segments.prefix"),
        ({"prefix": "a"}, {"prompt": "b"}, "segments"),
        ({"prefix": "a"}, {"suffix": "b"}, "segments"),
        ({"prefix": "a"}, {"echo": True}, "segments"),
        ({"prefix": "a", "filepath": "b" * 2000}, {}, "segments.filepath"),
        ({"prefix": "a", "declarations": [{}]}, {}, "segments.declarations.body"),
        ({"prefix": "a", "declarations": [{"body": ""}] * 65}, {}, "segments.declarations"),
    ],
)
def test_bad_segments_are_named(
    http: httpx.Client, segments: dict[str, Any], more: dict[str, Any], param: str
) -> None:
    response = tabby(http, segments, **more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_servers_least_confidence_is_for_suggestions_that_do_not_say(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = AppSettings(min_confidence=1.0)
    with (
        serving_tiny(tmp_path_factory.mktemp("model"), settings) as live,
        httpx.Client(base_url=live.url, timeout=30) as http,
    ):
        assert plain(http) == ""
        assert plain(http, albor={"session": "a"}) == ""
        assert plain(http, albor={"min_confidence": 0.0}) != ""
        asked = {"prompt": PREFIX, "max_tokens": 12, "temperature": 0}
        assert http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
        body = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "n_predict": 12, "temperature": 0}
        assert http.post("/infill", json=body).json()["content"] == ""


def test_a_prompt_written_out_in_qwens_order_is_understood(http: httpx.Client) -> None:
    """As Zed and others send it, with the stop strings of all families."""
    stops = ["<|endoftext|>", "<|fim_pad|>", "<|fim_prefix|>", "<fim_prefix>", "<PRE>", "[SUFFIX]"]
    written = f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
    body = {"prompt": written, "max_tokens": 12, "temperature": 0, "stop": stops}
    for path in ("/v1/completions", "/completion"):
        answer = http.post(path, json=body).json()
        text = answer["choices"][0]["text"] if "choices" in answer else answer["content"]
        assert text == plain(http, stop=stops)
