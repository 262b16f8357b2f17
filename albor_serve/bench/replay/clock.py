"""Time for a replay: real while anything is in flight; idle waiting may be skipped."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Final

__all__ = ["Clock"]

SETTLE_TURNS: Final = 10
"""Turns of the event loop after which tasks that could run have run."""


class Clock:
    """Seconds since it was made. One for each replay, used inside one event loop.

    With `skip_idle`, waiting jumps to the next deadline where no `working` block is open: people's
    pauses then cost nothing, and nothing that is measured gets shorter. Use it as an asynchronous
    context manager; deadlines pass only inside.
    """

    def __init__(
        self, *, skip_idle: bool = False, real: Callable[[], float] = time.perf_counter
    ) -> None:
        self.skipped_s = 0.0
        """Idle time that was not waited for."""
        self._skip_idle = skip_idle
        self._real = real
        self._began = real()
        self._num_working = 0
        self._deadlines: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()
        self._changed = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None

    def now(self) -> float:
        """Seconds, skipped ones included."""
        return self._real() - self._began + self.skipped_s

    def at(self, deadline: float) -> asyncio.Future[None]:
        """Done at `deadline`; whoever holds it may set its result earlier."""
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._deadlines, (deadline, next(self._order), future))
        self._changed.set()
        return future

    async def sleep(self, seconds: float) -> None:
        """Wait so long by this clock."""
        await self.at(self.now() + seconds)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Something is in flight inside: real time counts."""
        self._num_working += 1
        try:
            yield
        finally:
            self._num_working -= 1
            self._changed.set()

    async def __aenter__(self) -> Clock:
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._driver is not None
        self._driver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._driver

    async def _drive(self) -> None:
        while True:
            self._changed.clear()
            while self._deadlines and self._deadlines[0][2].done():
                heapq.heappop(self._deadlines)
            if not self._deadlines:
                await self._changed.wait()
                continue
            deadline, _, future = self._deadlines[0]
            gap = deadline - self.now()
            if gap <= 0:
                future.set_result(None)
                await self._settle()
            elif self._skip_idle and not self._num_working:
                await self._settle()
                if not self._changed.is_set():
                    self.skipped_s += max(0.0, deadline - self.now())
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), gap)

    async def _settle(self) -> None:
        for _ in range(SETTLE_TURNS):
            await asyncio.sleep(0)
