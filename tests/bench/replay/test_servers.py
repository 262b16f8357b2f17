"""The replay reads the counters that albor-serve really writes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from albor_serve.bench.replay.servers import read_totals
from tests.api.live import serving_tiny


def test_totals_come_from_the_servers_own_counters(tmp_path: Path) -> None:
    with serving_tiny(tmp_path) as live:
        address = live.url.removeprefix("http://")
        assert asyncio.run(read_totals(address)).num_decoded == 0
        body = {"prompt": "def add(a, b):", "max_tokens": 5, "ignore_eos": True}
        usage = httpx.post(f"{live.url}/v1/completions", json=body).json()["usage"]
        httpx.post(f"{live.url}/v1/completions", json=body)
        totals = asyncio.run(read_totals(address))
        assert totals.num_decoded == 10
        # The second request found all but its last token cached.
        assert totals.num_new_prompt == usage["prompt_tokens"] + 1
