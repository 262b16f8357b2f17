"""What rows cost: a short measurement of a backend, for the decision whether drafts pay."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from albor_serve.backends.base import Backend, ExtendStep, LogitsFor
from albor_serve.errors import ConfigError

__all__ = ["RowCosts", "calibrate"]

_ROWS = (1, 2, 3, 4, 6, 8, 16)
_MIN_PREFILL_LEN = 16
_MAX_PREFILL_LEN = 256
_MAX_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Measured time of one `extend` of one slot, by its number of logit rows.

    The times are as measured, and need not rise with the rows: kernels that work in groups of
    four can do four rows faster than three.
    """

    points: tuple[tuple[int, float], ...]
    """(rows, milliseconds), rows ascending; at least one."""
    prefill_ms_per_token: float
    """Milliseconds for each token of a long `extend` that asks for the last row only."""
    context_len: int
    """Tokens that the slot held while the rows were measured."""

    def __post_init__(self) -> None:
        rows = [r for r, _ in self.points]
        if not rows or rows[0] < 1 or rows != sorted(set(rows)):
            raise ConfigError(f"row costs are given for rows {rows}: give rising counts from 1 on")

    def ms(self, rows: int) -> float:
        """Milliseconds of one `extend` with `rows` rows, interpolated between the points.

        Beyond the last point each row costs what the last ones did.
        """
        if rows < 1:
            raise ConfigError(f"no cost is known for {rows} rows: ask for at least 1")
        points = self.points
        if rows <= points[0][0] or len(points) == 1:
            return points[0][1] * max(1.0, rows / points[0][0])
        high = next((i for i, (r, _) in enumerate(points) if r >= rows), len(points) - 1)
        (r0, t0), (r1, t1) = points[high - 1], points[high]
        return max(0.0, t0 + (t1 - t0) * (rows - r0) / (r1 - r0))


def calibrate(
    backend: Backend, budget_ms: float = 500.0, clock: Callable[[], float] = time.perf_counter
) -> RowCosts:
    """Measure `backend` for about `budget_ms` and leave all its slots empty.

    Each number is the least of a few repetitions, because other programs can only add time. A
    slow model takes longer than the budget: everything is measured at least once, after one
    unmeasured call.

    Args:
        backend: idle; what its slots hold is dropped.
        budget_ms: time to spend.
        clock: seconds from any start.

    Raises:
        BackendError, Aborted: from the backend; the slots are empty then, too.
    """
    if not budget_ms > 0:
        raise ConfigError(f"the calibration budget is {budget_ms} ms: it must be above 0")
    info = backend.info
    end = clock() + budget_ms / 1e3

    def timed(slot_len: int, count: int, logits_for: LogitsFor) -> float:
        backend.rewind(0, slot_len)
        # Ids spread over the vocabulary: their embedding rows are not all in one cache line.
        tokens = [(slot_len + i) * 7919 % info.vocab_size for i in range(count)]
        begin = clock()
        backend.extend([ExtendStep(0, tokens, logits_for)])
        return (clock() - begin) * 1e3

    _empty(backend)
    try:
        room = min(info.max_batch_len, info.max_seq_len // 2)
        prefill_len = max(1, min(_MIN_PREFILL_LEN, room))
        timed(0, prefill_len, "last")
        prefill_ms = timed(0, prefill_len, "last")
        affordable = int(prefill_len * budget_ms / 3 / max(prefill_ms, 1e-3))
        longer = min(_MAX_PREFILL_LEN, room, affordable)
        if longer > prefill_len:
            prefill_len = longer
            prefill_ms = timed(0, prefill_len, "last")
        limit = min(info.max_batch_len, info.max_seq_len - prefill_len)
        best = {rows: float("inf") for rows in _ROWS if rows == 1 or rows <= limit}
        for _ in range(_MAX_ROUNDS):
            for rows in best:
                if clock() >= end and best[rows] != float("inf"):
                    continue
                best[rows] = min(best[rows], timed(prefill_len, rows, "all"))
            if clock() >= end:
                break
    finally:
        _empty(backend)
    return RowCosts(tuple(best.items()), prefill_ms / prefill_len, prefill_len)


def _empty(backend: Backend) -> None:
    for slot in range(backend.info.num_slots):
        backend.rewind(slot, 0)
