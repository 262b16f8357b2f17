"""From the engine's thread to asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from albor_serve.sequence import Event

__all__ = ["EventBridge"]


class EventBridge:
    """Collects the events of several requests for one coroutine.

    However many events pile up, the event loop is woken once: waking it costs as much as some
    tokens' worth of JSON.
    """

    def __init__(self) -> None:
        """Must be called in a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._ready = asyncio.Event()
        self._wake_is_due = False

    def sink(self, index: int) -> Callable[[Event], None]:
        """A receiver for the events of request `index`; called on the engine's thread."""

        def receive(event: Event) -> None:
            self._events.append((index, event))
            if not self._wake_is_due:
                self._wake_is_due = True
                self._loop.call_soon_threadsafe(self._wake)

        return receive

    async def next_batch(self) -> list[tuple[int, Event]]:
        """Wait for events; returns all that are there as (request index, event)."""
        await self._ready.wait()
        self._ready.clear()
        batch = []
        while self._events:
            batch.append(self._events.popleft())
        return batch

    def _wake(self) -> None:
        # Cleared before the queue is read, so that no event can be missed.
        self._wake_is_due = False
        self._ready.set()
