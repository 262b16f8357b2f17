"""The load against a real server: everything is counted, and nothing stays behind."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from albor_serve.bench.mixed_load import (
    FINISHED_KINDS,
    LoadTarget,
    MixSettings,
    percentiles,
    run_load,
)
from albor_serve.errors import ConfigError
from tests.api.live import serving_tiny


def test_requests_are_counted_and_slots_are_freed(tmp_path: Path) -> None:
    with serving_tiny(tmp_path, num_slots=2) as live:
        target = LoadTarget("albor", live.url, os.getpid())
        settings = MixSettings(num_clients=4, round_s=1.0, num_rounds=2, num_new=4)
        tally = run_load([target], settings)["albor"]
    assert tally.num_finished == sum(len(ms) for ms in tally.first_token_ms.values()) > 0
    assert set(tally.total_ms) == set(tally.first_token_ms) <= set(FINISHED_KINDS)
    assert tally.num_tokens > 0
    assert tally.num_lost == 0
    assert tally.num_busy_slots == 0
    assert len(tally.rss_mib) == 3


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="nobody does not answer"):
        run_load([LoadTarget("nobody", "http://127.0.0.1:9")], MixSettings())


def test_percentiles_of_a_kind_and_of_all() -> None:
    times = {"fim": [1.0, 2.0, 3.0], "long": [100.0]}
    assert percentiles(times, "fim")[0] == 2.0
    assert percentiles(times, "long") == (100.0, 100.0, 100.0)
    assert percentiles(times)[0] == 2.5
    assert all(math.isnan(value) for value in percentiles(times, "other"))
