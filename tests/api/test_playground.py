"""The playground's files and the headers that guard them; tests/e2e drives the page itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from albor_serve.api.playground import MEDIA_TYPES
from tests.api.live import serving_tiny


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        serving_tiny(tmp_path_factory.mktemp("model")) as live,
        httpx.Client(base_url=live.url) as client,
    ):
        yield client


def test_a_browser_gets_the_page_and_a_program_plain_text(http: httpx.Client) -> None:
    page = http.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert http.get("/").headers["content-type"].startswith("text/plain")


def test_every_file_is_served_guarded_and_nothing_else(http: httpx.Client) -> None:
    for name, media_type in MEDIA_TYPES.items():
        answer = http.get(f"/playground/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"].startswith(media_type)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    for name in ("index.html", "none.js", "..%2f__init__.py", "%2e%2e/app.py"):
        assert http.get(f"/playground/{name}").status_code == 404, name


def test_the_page_refers_to_files_of_this_server_and_has_nothing_inline(http: httpx.Client) -> None:
    html = http.get("/", headers={"accept": "text/html"}).text
    urls = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert urls
    assert {url.removeprefix("/playground/") for url in urls} <= MEDIA_TYPES.keys()
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*\ssrc=)", html)
    script = http.get("/playground/playground.js").text
    assert "https://" not in script


def test_the_finish_chunk_tells_the_timings_to_those_who_use_albors_options(
    http: httpx.Client,
) -> None:
    body = {"prompt": "a", "max_tokens": 3, "stream": True}
    with_usage = {**body, "stream_options": {"include_usage": True}}

    def chunks(request: dict[str, object]) -> list[dict[str, object]]:
        lines = http.post("/v1/completions", json=request).text.split("\n\n")
        return [json.loads(x.removeprefix("data: ")) for x in lines if x.startswith("data: {")]

    assert not any("albor" in chunk for chunk in chunks(with_usage))
    told = [c["albor"] for c in chunks({**with_usage, "albor": {"session": "s"}}) if "albor" in c]
    timings = told[-1]["timings"]  # type: ignore[index]
    assert timings["num_new_tokens"] == 3
    assert timings["total_ms"] >= timings["queue_ms"] >= 0
