"""Counting durations and sizes in buckets, as Prometheus reads them, and what the engine counts."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

from albor_serve.sequence import FinishReason, Timings

__all__ = ["EngineMetrics", "Histogram", "HistogramView"]

TIME_BOUNDS_S: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(0.75, 1.0, 2.0, 5.0, 10.0, 30.0),
)
TOKEN_BOUNDS: Final = (
    0.0,
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    4096.0,
)


@dataclass(frozen=True, slots=True)
class HistogramView:
    """A histogram at one moment."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets, inclusive; a last bucket without bound follows."""
    counts: tuple[int, ...]
    """Observations in each bucket alone; one more than bounds."""
    total: float
    """Sum of all observed values."""


class Histogram:
    """Counts of values in fixed buckets. Not thread-safe: its owner locks."""

    def __init__(self, bounds: tuple[float, ...] = TIME_BOUNDS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times over."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def view(self) -> HistogramView:
        """A copy that no longer changes."""
        return HistogramView(self._bounds, tuple(self._counts), self._total)


@dataclass(slots=True)
class EngineMetrics:
    """What the engine learns from each request that ends. Times are in seconds."""

    queue: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    """Mean pause between an answer's tokens, counted once for each pause."""
    total: Histogram = field(default_factory=Histogram)
    cancel: Histogram = field(default_factory=Histogram)
    """From the cancel (by a caller or a newer request) to the free slot."""
    new_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))
    """Prompt tokens that were not in the cache, for each request that was not cancelled."""
    num_stale_tokens: int = 0
    """Tokens computed for requests that were then cancelled."""

    def observe(
        self, reason: FinishReason, timings: Timings, num_computed: int, cancel_s: float
    ) -> None:
        """Count a request that has ended; `cancel_s` counts only where it was cancelled."""
        if reason == "cancelled":
            self.cancel.observe(cancel_s)
            self.num_stale_tokens += num_computed
            return
        self.queue.observe(timings.queue_ms / 1000)
        self.total.observe(timings.total_ms / 1000)
        self.new_prompt_tokens.observe(timings.num_prompt_tokens - timings.num_cached_tokens)
        if timings.first_token_ms is not None:
            self.first_token.observe(timings.first_token_ms / 1000)
        num_pauses = timings.num_new_tokens - 1
        if num_pauses > 0:
            self.inter_token.observe(timings.decode_ms / 1000 / num_pauses, num_pauses)
