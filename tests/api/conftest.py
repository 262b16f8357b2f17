"""A server over a tiny model, for every file that needs no other."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.api.live import Live, serving_tiny


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving_tiny(tmp_path_factory.mktemp("model")) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    """A client of the file's `live`."""
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client
