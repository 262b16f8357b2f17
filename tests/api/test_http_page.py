"""docs/http.md tells of every endpoint and field, and its examples work."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.http_reference import PAGE, openapi, page_with
from tests.api.live import Live

TEXT = PAGE.read_text(encoding="utf-8")
SERVER = "http://127.0.0.1:8080"
EXAMPLES = [
    command
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for command in re.findall(r"^curl .*?(?=^curl |\Z)", block, re.DOTALL | re.MULTILINE)
]


def test_the_reference_is_the_servers_own() -> None:
    """If this fails: python scripts/http_reference.py."""
    assert page_with(TEXT, openapi()) == TEXT


def test_every_field_of_a_body_is_explained() -> None:
    document = openapi()
    parts = document["components"]["schemas"]
    bodies = {
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for operations in document["paths"].values()
        for operation in operations.values()
        if "requestBody" in operation
    }
    assert len(bodies) >= 6
    waiting, seen = list(bodies), set()
    while waiting:
        ref = waiting.pop()
        if ref in seen:
            continue
        seen.add(ref)
        part = parts[ref.rsplit("/", 1)[1]]
        waiting += re.findall(r"#/components/schemas/\w+", json.dumps(part))
        missing = [name for name, field in part["properties"].items() if not field["description"]]
        assert not missing, (ref, missing)


def test_every_endpoint_is_there() -> None:
    for path in openapi()["paths"]:
        assert re.search(rf"^### (GET|POST) {re.escape(path)}$", TEXT, re.MULTILINE), path


@pytest.mark.parametrize("command", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_works(live: Live, command: str) -> None:
    words = shlex.split(command.replace(SERVER, live.url))
    done = subprocess.run(
        [*words, "--silent", "--show-error", "--fail-with-body", "--max-time", "30"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "-N" in words:
        assert done.stdout.rstrip().endswith("data: [DONE]")
    elif not words[1].endswith("/metrics"):
        json.loads(done.stdout)


def test_the_error_that_it_shows_is_real(live: Live) -> None:
    import httpx

    (shown,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    response = httpx.post(live.url + "/v1/completions", json={"prompt": "a", "n": 99})
    assert response.status_code == 400
    got: dict[str, Any] = response.json()["error"]
    assert got | json.loads(shown)["error"] == got


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 15
    assert Path(PAGE).name == "http.md"
