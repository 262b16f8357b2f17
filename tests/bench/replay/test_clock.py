from __future__ import annotations

import asyncio
import time

from albor_serve.bench.replay.clock import Clock
from tests.bench.replay.fakes import in_loop, virtual_clock


@in_loop
async def test_deadlines_pass_in_order_without_waiting() -> None:
    clock = virtual_clock()
    seen: list[tuple[str, float]] = []

    async def wait(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        seen.append((name, clock.now()))

    async with clock:
        await asyncio.gather(wait("late", 500.0), wait("early", 100.0))
    assert seen == [("early", 100.0), ("late", 500.0)]


@in_loop
async def test_an_early_wake_up_leaves_the_other_deadlines_alone() -> None:
    clock = virtual_clock()
    async with clock:
        woken = clock.at(1000.0)
        woken.set_result(None)
        await woken
        assert clock.now() == 0.0
        await clock.sleep(5.0)
        assert clock.now() == 5.0


@in_loop
async def test_time_in_flight_is_real() -> None:
    clock = Clock(skip_idle=True)
    started = time.perf_counter()

    async def work() -> None:
        with clock.working():
            await asyncio.sleep(0.15)

    async with clock:
        task = asyncio.create_task(work())
        await clock.sleep(60.0)
        await task
    # The pause was skipped, but not before the work had ended.
    assert 0.15 <= time.perf_counter() - started < 30
    assert 55 < clock.skipped_s < 60


@in_loop
async def test_without_skipping_all_time_is_real() -> None:
    clock = Clock()
    started = time.perf_counter()
    async with clock:
        await clock.sleep(0.05)
    assert time.perf_counter() - started >= 0.05
    assert clock.skipped_s == 0.0
