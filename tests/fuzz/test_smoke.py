"""A short run of each fuzzer: it works, and finds nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import raw, seeds
from fuzz.loaders import gguf_target, hf_target, load_target
from fuzz.server import FuzzServer, fuzz_server


@pytest.fixture(scope="module")
def server() -> Iterator[FuzzServer]:
    with fuzz_server() as server:
        yield server


def test_seeds_are_sound() -> None:
    assert sum(gguf_target(seed) for seed in seeds.gguf_seeds()) >= 4
    assert all(load_target(seed) for seed in seeds.gguf_seeds()[:2])
    assert hf_target(seeds.hf_seeds()[0])


def test_mutated_gguf_files() -> None:
    originals, rng = seeds.gguf_seeds(), random.Random(7)
    ends = Counter(gguf_target(seeds.mutate_gguf(rng.choice(originals), rng)) for _ in range(150))
    assert ends[True] > 5
    assert ends[False] > 50


@pytest.mark.slow
def test_mutated_files_of_other_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    originals, rng = seeds.foreign_seeds(), random.Random(7)
    ends = Counter(load_target(seeds.mutate_gguf(rng.choice(originals), rng)) for _ in range(100))
    assert ends[True] > 5
    assert ends[False] > 20


def test_mutated_folders() -> None:
    originals, rng = seeds.hf_seeds(), random.Random(7)
    ends = Counter(hf_target(seeds.mutate_hf(rng.choice(originals), rng)) for _ in range(60))
    assert ends[False] > 20


def test_raw_bytes(server: FuzzServer) -> None:
    report = raw.run(server, 200, workers=4, seed=3)
    assert not report.problems
    assert report.num_cases >= 200
    assert report.statuses[400] > 20


def test_a_problem_would_be_seen() -> None:
    case = raw.make_case(random.Random(1))
    assert raw._judge(case, b"HTTP/1.1 500 Oops\r\n\r\n", True)[1]
    assert raw._judge(case, b"HTTP/1.1 400 Bad\r\n\r\n" + raw.MARKER, True)[1]
    assert raw._judge(case, b"garbage", True)[1]
    assert raw._judge(case, b"HTTP/1.1 200 OK\r\n\r\n" + raw.MARKER, True)[1] is None
