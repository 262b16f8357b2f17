"""How many threads to compute with, so that a busy machine does not freeze the text.

llama.cpp's threads wait for each other some hundred times a token, spinning. If one of them has
lost its core to another program, all others wait for a scheduler's time slice each time. Measured
on 2 cores beside two busy programs, 33M model: 2 threads 2,600 ms a token, 1 thread 35 ms. So
threads are given only the cores that nobody else uses.

And a small pass is left to one thread: waking a second one whose core has slept since the last key
takes longer than the pass. Measured on 2 virtual cores, the 33M model, first and further tokens
after a pause of 130 ms: 1 thread 2.8 and 1.7 ms, 2 threads 5.8 and 4.7 ms.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CpuTimes", "ThreadGovernor", "is_small_pass", "read_cpu_times"]

SMALL_PASS_BYTES = 64 << 20
"""Weights read, and rows computed in terms of them, in some 8 ms by one thread."""
ROWS_PER_READING = 4
"""So many rows of arithmetic take one thread as long as reading the weights once."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Clocks of this machine at one moment, all in seconds."""

    wall_s: float
    busy_s: float
    """Time that the CPUs this process may use have spent on anybody's work, stolen time too."""
    own_s: float
    """CPU time of this process."""
    num_cpus: int
    """CPUs that this process may use."""
    num_runnable: int
    """Threads on the machine that run or want to run, at this moment."""


def read_cpu_times(proc: Path = Path("/proc")) -> CpuTimes | None:
    """The clocks, or None where the system does not tell (anything but Linux)."""
    try:
        lines = (proc / "stat").read_text().splitlines()
        runnable = (proc / "loadavg").read_text().split()[3].partition("/")[0]
        allowed = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        busy = 0
        num_cpus = 0
        for line in lines:
            name, *fields = line.split()
            if name in allowed:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                busy += user + nice + system + irq + softirq + steal
                num_cpus += 1
        if not num_cpus:
            return None
        return CpuTimes(
            time.monotonic(),
            busy / ticks_per_s,
            time.process_time(),
            num_cpus,
            int(runnable),
        )
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def is_small_pass(weight_bytes: int, num_rows: int) -> bool:
    """Whether one thread is done with these rows before a second one would help."""
    return weight_bytes * (1 + num_rows / ROWS_PER_READING) <= SMALL_PASS_BYTES


class ThreadGovernor:
    """Fits the number of threads to the cores that other programs leave free."""

    MIN_WINDOW_S = 0.1
    """The kernel counts CPU time in hundredths of a second: a shorter look says nothing."""
    MAX_WINDOW_S = 2.0
    """An average over longer says little of now; what is runnable right now says more."""
    SPARE = 0.4
    """Part of a core that others may use before a thread is given up for it."""

    def __init__(
        self,
        max_threads: int,
        read: Callable[[], CpuTimes | None] = read_cpu_times,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_threads = max_threads
        self._clock = clock
        self._read = read
        self._threads = max_threads
        self._last = read() if max_threads > 1 else None
        if self._last is not None:
            self._fit(self._last, others=float(max(0, self._last.num_runnable - 1)))

    def threads(self) -> int:
        """Threads for the next call, 1 to max_threads. Takes about 50 µs ten times a second."""
        last = self._last
        if last is None or self._clock() - last.wall_s < self.MIN_WINDOW_S:
            return self._threads
        now = self._read()
        if now is None:
            return self._threads
        window_s = now.wall_s - last.wall_s
        if window_s > self.MAX_WINDOW_S:
            others = float(max(0, now.num_runnable - 1))
        else:
            busy_s = (now.busy_s - last.busy_s) - (now.own_s - last.own_s)
            others = max(0.0, busy_s / window_s)
        self._last = now
        self._fit(now, others)
        return self._threads

    def _fit(self, now: CpuTimes, others: float) -> None:
        free = int(now.num_cpus - others + self.SPARE)
        self._threads = max(1, min(self._max_threads, free))
