from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from albor_serve.backends.thread_governor import (
    CpuTimes,
    ThreadGovernor,
    is_small_pass,
    read_cpu_times,
)


class Machine:
    """A machine whose load is set by the test."""

    def __init__(self, num_cpus: int = 4) -> None:
        self.now = CpuTimes(0.0, 0.0, 0.0, num_cpus, 1)
        self.num_reads = 0

    def read(self) -> CpuTimes | None:
        self.num_reads += 1
        return self.now

    def clock(self) -> float:
        return self.now.wall_s

    def run(self, seconds: float, own: float, others: float, runnable: int = 1) -> None:
        """Let time pass with so many cores busy with this process and with others."""
        now = self.now
        self.now = CpuTimes(
            now.wall_s + seconds,
            now.busy_s + seconds * (own + others),
            now.own_s + seconds * own,
            now.num_cpus,
            runnable,
        )


def governed(machine: Machine, max_threads: int = 4) -> ThreadGovernor:
    return ThreadGovernor(max_threads, machine.read, machine.clock)


@pytest.mark.parametrize(
    ("others", "threads"), [(0.0, 4), (0.3, 4), (0.5, 3), (1.0, 3), (2.0, 2), (3.9, 1), (9.0, 1)]
)
def test_threads_are_what_others_leave(others: float, threads: int) -> None:
    machine = Machine()
    governor = governed(machine)
    machine.run(0.5, own=4 - min(others, 4), others=others)
    assert governor.threads() == threads


def test_its_own_work_is_not_held_against_it() -> None:
    machine = Machine()
    governor = governed(machine)
    machine.run(0.5, own=4.0, others=0.0)
    assert governor.threads() == 4


def test_returns_to_all_threads_when_the_others_stop() -> None:
    machine = Machine()
    governor = governed(machine)
    machine.run(0.5, own=1, others=3)
    assert governor.threads() == 1
    machine.run(0.2, own=1, others=0)
    assert governor.threads() == 4


def test_looks_at_most_ten_times_a_second() -> None:
    machine = Machine()
    governor = governed(machine)
    for _ in range(100):
        machine.run(0.01, own=4, others=0)
        governor.threads()
    assert machine.num_reads <= 12


def test_after_a_long_pause_what_runs_now_counts() -> None:
    machine = Machine()
    governor = governed(machine)
    machine.run(100, own=0, others=4, runnable=1)  # busy before, quiet now
    assert governor.threads() == 4
    machine.run(100, own=0, others=0, runnable=3)  # quiet before, two others now
    assert governor.threads() == 2


def test_starts_with_what_is_free_at_that_moment() -> None:
    machine = Machine()
    machine.run(1.0, own=0, others=4, runnable=4)
    assert governed(machine).threads() == 1


def test_more_cpus_than_threads_leave_room_for_others() -> None:
    machine = Machine(num_cpus=8)
    governor = governed(machine)
    machine.run(0.5, own=4, others=4)
    assert governor.threads() == 4


def test_without_clocks_all_threads_are_used() -> None:
    assert ThreadGovernor(3, lambda: None).threads() == 3
    machine = Machine()
    governor = governed(machine)
    machine.run(1.0, own=0, others=4)
    machine.read = lambda: None  # type: ignore[method-assign]
    governor = ThreadGovernor(2, machine.read, machine.clock)
    assert governor.threads() == 2


def test_one_thread_needs_no_looking() -> None:
    machine = Machine()
    governor = governed(machine, max_threads=1)
    machine.run(1.0, own=0, others=4)
    assert governor.threads() == 1
    assert machine.num_reads == 0


def test_reads_the_kernels_files(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [0]
    hertz = os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(
        "cpu 9 9 9 9 9 9 9 9 9 9\n"
        + "".join(f"cpu{cpu} {hertz} 0 {hertz} 500 700 0 0 {hertz} 0 0\n" for cpu in cpus)
        + "cpu9999 5 5 5 5 5 5 5 5 5 5\nintr 1 2 3\n"
    )
    (tmp_path / "loadavg").write_text("0.50 0.40 0.30 3/512 12345\n")
    times = read_cpu_times(tmp_path)
    assert times is not None
    assert times.busy_s == pytest.approx(3 * len(cpus))
    assert (times.num_cpus, times.num_runnable) == (len(cpus), 3)


@pytest.mark.parametrize("stat", [None, "", "cpu0 x y\n", "cpu0 1 2\n"])
def test_strange_files_give_none(tmp_path: Path, stat: str | None) -> None:
    if stat is not None:
        (tmp_path / "stat").write_text(stat)
        (tmp_path / "loadavg").write_text("0 0 0 1/1 1\n")
    assert read_cpu_times(tmp_path) is None


def test_few_rows_of_a_small_model_are_left_to_one_thread() -> None:
    small, large = 19 << 20, 150 << 20
    assert is_small_pass(small, 1)
    assert is_small_pass(small, 8)
    assert not is_small_pass(small, 16)
    assert not is_small_pass(large, 1)
