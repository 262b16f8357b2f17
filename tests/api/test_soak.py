"""Many clients that cancel, disconnect and supersede, against the embedded model over HTTP."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from albor_serve.api.completion import ServedModel
from albor_serve.loader import LoadOptions, load_model
from tests.api.live import Live, serving

URL = "/v1/completions"
SOURCE = Path(__file__).parents[2] / "albor_serve" / "engine.py"
NEAR_TIE = 0.1
"""Nats between the two likeliest tokens below which rounding may decide: a row of logits differs
in its last bits with the rows computed beside it."""


@dataclass
class Tally:
    """What the clients saw."""

    num_whole: int = 0
    num_superseded: int = 0
    num_dropped: int = 0
    ties: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def body_of(rng: random.Random, text: str) -> dict[str, object]:
    """One of a limited number of requests, so that answers given alone can be kept."""
    start = rng.randrange(0, 20) * 200
    size = rng.choice([40, 300, 900])
    cursor = start + size
    body: dict[str, object] = {
        "prompt": text[start:cursor],
        "max_tokens": rng.choice([1, 8, 24]),
        "temperature": 0,
    }
    if rng.random() < 0.5:
        body["suffix"] = text[cursor : cursor + 200]
    return body


def test_short_soak(live: Live) -> None:
    soak(live, num_clients=8, num_each=12)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousand_requests(live: Live) -> None:
    tally = soak(live, num_clients=8, num_each=125)
    print(tally)


@pytest.fixture
def live() -> Iterator[Live]:
    loaded = load_model(None, LoadOptions(num_slots=4, max_seq_len=1024))
    loaded.engine.start()
    try:
        with serving(ServedModel("albor", loaded.engine, loaded.template)) as live:
            yield live
    finally:
        loaded.engine.close()


def soak(live: Live, num_clients: int, num_each: int) -> Tally:
    text = SOURCE.read_text(encoding="utf-8")
    tally = Tally()
    alone: dict[str, Alone] = {}
    rngs = [random.Random(seed) for seed in range(num_clients)]
    plans = [[body_of(rng, text) for _ in range(num_each)] for rng in rngs]
    with httpx.Client(base_url=live.url, timeout=120) as http:
        for body in (body for plan in plans for body in plan):
            key = json.dumps(body, sort_keys=True)
            if key not in alone:
                alone[key] = answer_alone(http, body)
    memory_before = resident_bytes()

    def client(rng: random.Random, plan: list[dict[str, object]]) -> None:
        with httpx.Client(base_url=live.url, timeout=120) as http:
            for body in plan:
                try:
                    one_request(http, rng, body, alone[json.dumps(body, sort_keys=True)], tally)
                except Exception as error:  # noqa: BLE001 - reported by the test
                    tally.failures.append(repr(error))

    threads = [threading.Thread(target=client, args=pair) for pair in zip(rngs, plans, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not tally.failures, tally.failures[:3]
    assert tally.num_whole > num_clients * num_each / 4
    deadline = time.monotonic() + 10
    while (stats := live.engine.stats()).num_running or stats.num_waiting:
        assert time.monotonic() < deadline, "requests were left behind"
        time.sleep(0.01)
    assert not any(slot.is_busy for slot in stats.slots)
    assert stats.failure is None
    assert stats.num_failed == 0
    assert resident_bytes() - memory_before < 30e6
    return tally


@dataclass(frozen=True)
class Alone:
    """An answer that was computed with nothing beside it."""

    text: str
    offsets: list[int]
    margins: list[float]
    """After each token: nats between the two likeliest."""

    def margin_at(self, other: str) -> float:
        """Margin of the token in which `other` first differs."""
        pairs = zip(self.text, other, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(other))
        at = sum(offset <= same for offset in self.offsets) - 1
        # The character may belong to this token or, where texts end, to the next.
        return min(self.margins[max(at - 1, 0) : at + 2], default=0.0)


def answer_alone(http: httpx.Client, body: dict[str, object]) -> Alone:
    choice = http.post(URL, json={**body, "logprobs": 2}).json()["choices"][0]
    margins = []
    for top in choice["logprobs"]["top_logprobs"]:
        ranked = sorted(top.values(), reverse=True)
        margins.append(ranked[0] - ranked[1] if len(ranked) > 1 else 0.0)
    return Alone(choice["text"], choice["logprobs"]["text_offset"], margins)


def one_request(
    http: httpx.Client,
    rng: random.Random,
    body: dict[str, object],
    alone: Alone,
    tally: Tally,
) -> None:
    kind = rng.random()
    if kind < 0.2:  # read a little of the stream, then go away
        with http.stream("POST", URL, json={**body, "stream": True}) as response:
            for _ in zip(range(rng.randrange(3)), response.iter_lines(), strict=False):
                pass
        with tally.lock:
            tally.num_dropped += 1
        return
    if kind < 0.5:  # one of few sessions: clients supersede each other
        body = {**body, "albor": {"session": f"s{rng.randrange(3)}"}}
    response = http.post(URL, json=body)
    with tally.lock:
        if response.status_code == 409:
            tally.num_superseded += 1
            return
        assert response.status_code == 200, response.text
        tally.num_whole += 1
        text = response.json()["choices"][0]["text"]
        if text != alone.text:
            margin = alone.margin_at(text)
            assert margin < NEAR_TIE, (text, alone)
            tally.ties.append(margin)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
