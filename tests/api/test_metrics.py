"""/metrics, request ids and log lines over a real server."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import httpx
import pytest

from albor_serve.api.app import AppSettings
from albor_serve.api.request_log import JsonFormatter, TextFormatter
from albor_serve.histogram import Histogram
from tests.api.live import Live, serving_tiny

URL = "/v1/completions"


def read(live: Live) -> dict[str, float]:
    answer = httpx.get(f"{live.url}/metrics", timeout=30)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"albor_\w+\{[^{}]*\} [0-9.e+-]+", line), line
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_counters_are_the_sums_of_the_requests(tmp_path: Path) -> None:
    with serving_tiny(tmp_path) as live:
        usages = []
        for prompt in ("def f(x):", "def f(x):", "class A:"):
            body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True}
            usages.append(httpx.post(live.url + URL, json=body, timeout=30).json()["usage"])
        httpx.post(live.url + URL, json={"prompt": 1}, timeout=30)
        values = read(live)
    model = 'model="albor-tiny"'
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    prompt_tokens = sum(usage["prompt_tokens"] for usage in usages)
    assert cached > 0
    assert values[f'albor_prompt_tokens_total{{{model},source="cached"}}'] == cached
    assert values[f'albor_prompt_tokens_total{{{model},source="new"}}'] == prompt_tokens - cached
    assert values[f"albor_generated_tokens_total{{{model}}}"] == 12
    assert values[f'albor_requests_total{{{model},outcome="finished"}}'] == 3
    assert values['albor_http_responses_total{status="200"}'] == 3
    assert values['albor_http_responses_total{status="400"}'] == 1
    for name, count in (
        ("time_to_first_token_seconds", 3),
        ("queue_seconds", 3),
        ("request_seconds", 3),
        ("new_prompt_tokens", 3),
        ("inter_token_seconds", 9),
        ("cancel_seconds", 0),
    ):
        assert values[f"albor_{name}_count{{{model}}}"] == count, name
        assert values[f'albor_{name}_bucket{{{model},le="+Inf"}}'] == count, name


def test_a_cancel_is_timed_and_its_work_is_stale(tmp_path: Path) -> None:
    with serving_tiny(tmp_path) as live:
        body = {"prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", live.url + URL, json=body, timeout=30) as response:
            next(response.iter_lines())
        for _ in range(100):
            values = read(live)
            if values['albor_cancel_seconds_count{model="albor-tiny"}']:
                break
        assert values['albor_requests_total{model="albor-tiny",outcome="cancelled"}'] == 1
        assert values['albor_stale_tokens_total{model="albor-tiny"}'] > 0
        assert values['albor_cancel_seconds_sum{model="albor-tiny"}'] < 1
        assert values['albor_queue_seconds_count{model="albor-tiny"}'] == 0


def test_buckets_hold_their_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    histogram.observe(3.0, times=2)
    view = histogram.view()
    assert view.counts == (2, 2, 3)
    assert view.total == 13.5


def test_ids_are_kept_if_they_are_words(tmp_path: Path) -> None:
    with serving_tiny(tmp_path) as live:
        kept = httpx.get(f"{live.url}/nowhere", headers={"x-request-id": "editor-7"}, timeout=30)
        assert kept.headers["x-request-id"] == "editor-7"
        for offered in ("", "a b", "x" * 65, 'a"b'):
            answer = httpx.get(f"{live.url}/", headers={"x-request-id": offered}, timeout=30)
            assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])


@pytest.mark.parametrize("log_prompts", [False, True])
def test_bodies_are_logged_only_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    caplog.set_level(logging.INFO)
    with serving_tiny(tmp_path, AppSettings(log_prompts=log_prompts)) as live:
        body = {"prompt": "my_secret_name", "max_tokens": 1, "suffix": "also_secret"}
        httpx.post(live.url + URL, json=body, headers={"x-request-id": "id-1"}, timeout=30)
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert ("my_secret_name" in "".join(lines)) == log_prompts
    assert ("also_secret" in "".join(lines)) == log_prompts
    entry = next(json.loads(line) for line in lines if '"id-1"' in line)
    assert entry["method"] == "POST"
    assert entry["path"] == URL
    assert entry["status"] == 200
    assert entry["ms"] > 0


def test_nothing_sent_can_begin_a_log_line() -> None:
    record = logging.makeLogRecord(
        {
            "msg": "bad\nERROR forged",
            "levelname": "INFO",
            "fields": {"path": "/a\nERROR forged", "status": 404},
        }
    )
    for formatter in (TextFormatter(), JsonFormatter()):
        assert "\n" not in formatter.format(record)
    assert TextFormatter().format(record).endswith("status=404")
