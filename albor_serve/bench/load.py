"""Who else used the processor while something was measured.

A benchmark beside a busy program measures the scheduler: the report says so instead of hiding it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from albor_serve.backends.thread_governor import CpuTimes, read_cpu_times
from albor_serve.bench.peers import Peer

__all__ = ["LoadMeter"]

SHORTEST_TURN_S = 0.2
"""The kernel counts CPU time in hundredths of a second: a shorter turn says nothing."""


class LoadMeter:
    """CPU time of other programs, and of peers that should be idle, turn by turn."""

    def __init__(
        self,
        peers: Sequence[Peer],
        read: Callable[[], CpuTimes | None] = read_cpu_times,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.foreign_cores: list[float] = []
        """One figure for each turn that was long enough: other programs' CPU time over its time."""
        self._peers = peers
        self._read = read
        self._clock = clock
        self._idle_cpu_s = {peer.kind: 0.0 for peer in peers}
        self._idle_wall_s = {peer.kind: 0.0 for peer in peers}

    @contextlib.contextmanager
    def turn(self, active: Peer) -> Iterator[None]:
        """Measure what happens inside the `with`; only `active` should compute there."""
        before, cpu_before, started = self._read(), self._cpu_seconds(), self._clock()
        yield
        wall_s = self._clock() - started
        after, cpu_after = self._read(), self._cpu_seconds()
        used = {kind: cpu_after[kind] - cpu_before[kind] for kind in cpu_after}
        for kind in used:
            if kind != active.kind:
                self._idle_cpu_s[kind] += used[kind]
                self._idle_wall_s[kind] += wall_s
        if before is not None and after is not None and wall_s >= SHORTEST_TURN_S:
            ours = sum(used.values()) + after.own_s - before.own_s
            foreign_s = after.busy_s - before.busy_s - ours
            self.foreign_cores.append(max(0.0, foreign_s / wall_s))

    def idle_cores(self, peer: Peer) -> float:
        """CPU time of `peer` over the time of the others' turns; 0.0 if there were none."""
        wall_s = self._idle_wall_s[peer.kind]
        return self._idle_cpu_s[peer.kind] / wall_s if wall_s else 0.0

    def _cpu_seconds(self) -> dict[str, float]:
        return {peer.kind: peer.cpu_seconds() for peer in self._peers}
