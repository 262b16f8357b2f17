"""The row-cost measurement, on a backend whose time is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albor_serve.backends.base import Aborted, BackendInfo, ExtendStep, LogitRows
from albor_serve.backends.calibrate import RowCosts, calibrate
from albor_serve.backends.torch_ref import TorchReferenceBackend
from albor_serve.errors import ConfigError
from tests.fixtures_tiny import reader, tiny_model


class SimulatedBackend:
    """Spends `base + per_row * rows + per_token * tokens` ms of its own clock on each call."""

    def __init__(self, max_seq_len: int = 1024, slow: float = 1.0, fail_after: int = 10**9) -> None:
        self.info = BackendInfo("fake", "none", 1000, 2, max_seq_len, 512, 0, 0)
        self.abort: Any = None
        self.now_s = 0.0
        self.lengths = [0, 5]
        self.num_calls = 0
        self._slow = slow
        self._fail_after = fail_after

    def extend(self, steps: Sequence[ExtendStep]) -> list[LogitRows]:
        self.num_calls += 1
        if self.num_calls > self._fail_after:
            raise Aborted
        (step,) = steps
        self.lengths[step.slot] += len(step.tokens)
        assert self.lengths[step.slot] <= self.info.max_seq_len
        assert all(0 <= t < 1000 for t in step.tokens)
        jitter = 1.0 + 0.5 * (self.num_calls % 3)  # other programs only ever add time
        cost = 2.0 + 0.5 * step.num_rows if step.logits_for == "all" else 0.25 * len(step.tokens)
        self.now_s += self._slow * jitter * cost / 1e3
        return [np.zeros((step.num_rows, 1000), dtype=np.float32)]

    def rewind(self, slot: int, length: int) -> None:
        self.lengths[slot] = min(length, self.lengths[slot])

    def fork(self, src: int, dst: int, length: int) -> None:
        raise NotImplementedError

    def length(self, slot: int) -> int:
        return self.lengths[slot]

    def close(self) -> None:
        pass


def test_finds_the_costs_under_noise() -> None:
    backend = SimulatedBackend()
    costs = calibrate(backend, 500.0, clock=lambda: backend.now_s)
    assert [rows for rows, _ in costs.points] == [1, 2, 3, 4, 6, 8, 16]
    for rows in range(1, 17):
        assert costs.ms(rows) == pytest.approx(2.0 + 0.5 * rows)
    assert 0.25 <= costs.prefill_ms_per_token <= 0.5
    assert costs.context_len == 256
    assert backend.lengths == [0, 0]
    assert backend.now_s < 0.6


def test_slow_model_is_still_measured() -> None:
    backend = SimulatedBackend(slow=100.0)
    costs = calibrate(backend, 10.0, clock=lambda: backend.now_s)
    assert len(costs.points) == 7
    assert backend.num_calls == 2 + 7


def test_small_context_limits_the_rows() -> None:
    backend = SimulatedBackend(max_seq_len=12)
    costs = calibrate(backend, 100.0, clock=lambda: backend.now_s)
    assert [rows for rows, _ in costs.points] == [1, 2, 3, 4, 6]


def test_slots_are_empty_after_an_abort() -> None:
    backend = SimulatedBackend(fail_after=5)
    with pytest.raises(Aborted):
        calibrate(backend, clock=lambda: backend.now_s)
    assert backend.lengths == [0, 0]


def test_real_backend_is_left_empty() -> None:
    config, weights = tiny_model("llama")
    backend = TorchReferenceBackend(config, reader(weights), 2, 64)
    try:
        backend.extend([ExtendStep(1, [20, 21])])
        costs = calibrate(backend, 20.0)
        assert costs.ms(1) > 0
        assert costs.prefill_ms_per_token > 0
        assert [backend.length(0), backend.length(1)] == [0, 0]
    finally:
        backend.close()


def test_interpolation_and_extrapolation() -> None:
    costs = RowCosts(((1, 3.0), (3, 5.0), (4, 4.6), (8, 9.0)), 0.5, 100)
    assert [costs.ms(r) for r in (1, 2, 3, 4, 6)] == pytest.approx([3.0, 4.0, 5.0, 4.6, 6.8])
    assert costs.ms(12) == pytest.approx(13.4)
    assert RowCosts(((1, 3.0),), 0.5, 100).ms(4) == pytest.approx(12.0)


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.floats(0.01, 1e4)), min_size=1, unique_by=lambda p: p[0]
    )
)
def test_points_are_met_exactly(points: list[tuple[int, float]]) -> None:
    costs = RowCosts(tuple(sorted(points)), 1.0, 0)
    for rows, ms in points:
        assert costs.ms(rows) == pytest.approx(ms)
    assert costs.ms(200) >= 0.0


@pytest.mark.parametrize("points", [(), ((0, 1.0),), ((2, 1.0), (1, 2.0)), ((1, 1.0), (1, 2.0))])
def test_bad_points(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ConfigError, match="give rising counts"):
        RowCosts(points, 1.0, 0)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        RowCosts(((1, 1.0),), 1.0, 0).ms(0)
    with pytest.raises(ConfigError, match="above 0"):
        calibrate(SimulatedBackend(), 0.0)
