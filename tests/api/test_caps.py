"""Every field of every route has a limit; beyond it comes a 4xx that does not repeat the input.

The fields are taken from the server's own OpenAPI document, so a new field without a limit fails
here.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from albor_serve.api.app import AppSettings, create_app
from tests.api.live import Live, serving_tiny

MARKER = "xyzzyPlugh"
MAX_BODY_BYTES = 300_000
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/fim/completions": {"prompt": "a", "max_tokens": 1},
    "/infill": {"input_prefix": "a", "input_suffix": "", "n_predict": 1},
    "/completion": {"prompt": "a", "n_predict": 1},
    "/completions": {"prompt": "a", "n_predict": 1},
    "/tokenize": {"content": "a"},
    "/detokenize": {"tokens": [1]},
}
TEXTS = {"prompt", "prefix", "suffix", "content", "input_prefix", "input_suffix"}
"""Limited by the size of the body, and by the context."""
CHECKED_BY_HAND = {"prompt", "stop", "logit_bias"}
"""Of several types: see the other tests here."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = AppSettings(max_body_bytes=MAX_BODY_BYTES)
    with serving_tiny(tmp_path_factory.mktemp("model"), settings) as live:
        yield live


@pytest.fixture(scope="module")
def document(live: Live) -> dict[str, Any]:
    return create_app(live.served).openapi()


Place = tuple[str, ...]


def walk(schema: dict[str, Any], parts: dict[str, Any], place: Place = ()) -> Iterator[Any]:
    """(place, schema) of each field and element; "[]" stands for an element."""
    while "$ref" in schema:
        schema = parts[schema["$ref"].rsplit("/", 1)[1]]
    for choice in schema.get("anyOf", ()):
        yield from walk(choice, parts, place)
    if "type" in schema and place:
        yield place, schema
    for name, child in schema.get("properties", {}).items():
        if not (not place and name in CHECKED_BY_HAND):
            yield from walk(child, parts, (*place, name))
    if "items" in schema:
        yield from walk(schema["items"], parts, (*place, "[]"))


def beyond(schema: dict[str, Any]) -> Iterator[Any]:
    """Values just and far beyond a field's limits."""
    kind = schema["type"]
    if kind in ("integer", "number"):
        for key, sign in (("minimum", -1), ("maximum", 1)):
            if key in schema:
                yield schema[key] + sign
            else:
                yield schema["exclusive" + key.capitalize()]
            yield sign * 10**30
        yield MARKER
    elif kind == "string" and "maxLength" in schema:
        yield (MARKER * (schema["maxLength"] // len(MARKER) + 1))[: schema["maxLength"] + 1]
        yield 5
    elif kind == "string":
        yield {MARKER: 5}
    elif kind == "array":
        yield {MARKER: MARKER}
    elif kind in ("boolean", "object"):
        yield MARKER


def body_with(base: dict[str, Any], place: Place, value: Any, schema: Any) -> dict[str, Any]:
    """The base with a value at a place, and what else its object needs."""
    node: Any = value
    for i in reversed(range(1, len(place))):
        name = place[i]
        if name == "[]":
            node = [node]
        else:
            needed = {"path": "p", "text": "t"} if "extra" in place[i - 2] else {}
            node = {**needed, name: node}
    return {**base, place[0]: node}


def limits(document: dict[str, Any]) -> Iterator[tuple[str, Place, dict[str, Any]]]:
    parts = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        if "post" in operations:
            schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
            for place, field in walk(schema, parts):
                yield path, place, field


def test_every_field_has_a_limit(document: dict[str, Any]) -> None:
    without = []
    for path, place, schema in limits(document):
        kind = schema["type"]
        if kind in ("integer", "number"):
            sound = ("minimum" in schema or "exclusiveMinimum" in schema) and (
                "maximum" in schema or "exclusiveMaximum" in schema
            )
            sound = sound or place == ("tokens", "[]")  # checked against the vocabulary
        elif kind == "string":
            sound = "maxLength" in schema or "enum" in schema or place[-1] in TEXTS
        elif kind == "array":
            sound = "maxItems" in schema
        else:
            sound = kind in ("boolean", "null", "object")
        if not sound and "const" not in schema:
            without.append((path, place, schema))
    assert not without


def test_values_beyond_a_limit_are_refused(document: dict[str, Any], http: httpx.Client) -> None:
    wrong: list[tuple[Any, ...]] = []
    count = 0
    for path, place, schema in limits(document):
        if place == ("tokens", "[]"):
            continue
        for value in beyond(schema):
            count += 1
            body = body_with(BASES[path], place, value, schema)
            answer = http.post(path, json=body)
            param = answer.json().get("error", {}).get("param")
            if answer.status_code != 400 or MARKER in answer.text or len(answer.text) > 1000:
                wrong.append((path, place, str(value)[:30], answer.status_code, answer.text[:200]))
            elif param is None or param.split(".")[0] != place[0]:
                wrong.append((path, place, str(value)[:30], param))
    assert not wrong
    assert count > 300


def test_lists_beyond_their_length_are_refused(
    document: dict[str, Any], http: httpx.Client
) -> None:
    elements: dict[str, Any] = {
        "drafts": "d",
        "tokens": 1,
        "extra_context": {"path": "p", "text": "t"},
        "input_extra": {"filename": "p", "text": "t"},
    }
    num_lists = 0
    for path, place, schema in limits(document):
        if schema["type"] == "array":
            num_lists += 1
            value = [elements.get(place[-1], "s")] * (schema["maxItems"] + 1)
            answer = http.post(path, json=body_with(BASES[path], place, value, schema))
            assert answer.status_code == 400, (path, place, answer.text[:200])
    assert num_lists > 10


@pytest.mark.parametrize("path", sorted(BASES))
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", [MARKER] * 17),
        ("stop", MARKER * 26),
        ("stop", [""]),
        ("stop", {MARKER: 1}),
        ("logit_bias", {str(i): 1 for i in range(301)}),
        ("logit_bias", [[i, 1] for i in range(301)]),
        ("logit_bias", {MARKER: MARKER}),
        ("logit_bias", {"5": 1e300}),
        ("logit_bias", [[5, [MARKER]]]),
        ("prompt", [1] * 100_000),
        ("prompt", [-1]),
        ("prompt", [10**30]),
        ("prompt", MARKER * 5_000),
        ("prompt", {"prompt_string": {MARKER: 1}}),
        ("prompt", [[MARKER]] * 17),
    ],
)
def test_fields_of_several_types(http: httpx.Client, path: str, field: str, value: Any) -> None:
    if path in ("/tokenize", "/detokenize"):
        return  # they have no such fields
    if path == "/v1/fim/completions" and field == "logit_bias":
        return
    fits = path in ("/infill", "/v1/fim/completions") and value == MARKER * 5_000
    answer = http.post(path, json={**BASES[path], field: value})
    assert answer.status_code == (200 if fits else 400), answer.text[:300]
    assert fits or MARKER not in answer.text


@pytest.mark.parametrize("path", sorted(BASES))
def test_bodies_beyond_the_limit(http: httpx.Client, path: str) -> None:
    for field in sorted(TEXTS):
        answer = http.post(path, json={**BASES[path], field: MARKER * (MAX_BODY_BYTES // 10)})
        assert answer.status_code == 413
        assert MARKER not in answer.text


@pytest.mark.parametrize("field", ["xyzzyPlugh", "x" * 10_000])
def test_names_in_urls(http: httpx.Client, field: str) -> None:
    for url in (f"/v1/models/{field}", f"/{field}", f"/v1/completions/{field}"):
        answer = http.get(url)
        assert answer.status_code == 404
        assert field not in answer.text
    assert http.get("/slots", params={"fail_on_no_slot": field}).status_code == 200


def test_giant_heads_and_slow_bodies_do_not_stall_other_clients(
    live: Live, http: httpx.Client
) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    stop = threading.Event()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"

    def trickle(start: bytes) -> None:
        while not stop.is_set():
            try:
                with socket.create_connection((host, int(port)), timeout=5) as sock:
                    sock.sendall(start)
                    while not stop.wait(0.05):
                        sock.sendall(b"a")
            except OSError:
                continue

    def giant() -> None:
        while not stop.is_set():
            try:
                with socket.create_connection((host, int(port)), timeout=5) as sock:
                    sock.sendall(head + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n")
                    sock.recv(100)
            except OSError:
                pass
            stop.wait(0.01)

    starts = [head + b"X: ", head + b"Content-Length: 100000\r\n\r\n{"] * 20
    threads = [threading.Thread(target=trickle, args=(start,)) for start in starts]
    threads.append(threading.Thread(target=giant))
    large = json.dumps({"prompt": [MARKER * 20_000, 1], "n_predict": 1}).encode()
    waits = []
    try:
        for thread in threads:
            thread.start()
        for i in range(20):
            if i % 5 == 0:
                assert http.post("/completion", content=large).status_code == 400
            started = time.monotonic()
            answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            waits.append(time.monotonic() - started)
            assert answer.status_code == 200
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    # Without the limits one of these would hold everyone up for as long as it likes.
    assert sorted(waits)[len(waits) // 2] < 2
    assert not any(slot.is_busy for slot in live.engine.stats().slots)
