"""A client that knows what to suggest, and a clock that never really waits."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence

from albor_serve.bench.replay.clients.base import Client, EditorState
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.scenes import Scene, Source


def in_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Run an async test in an event loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


def virtual_clock() -> Clock:
    return Clock(skip_idle=True, real=lambda: 0.0)


class ScriptedClient(Client):
    """Suggests `suggest(state)` after `delay_s` by the clock."""

    def __init__(
        self, clock: Clock, suggest: Callable[[EditorState], str], delay_s: float = 0.05
    ) -> None:
        super().__init__("scripted")
        self.clock = clock
        self.suggest = suggest
        self.delay_s = delay_s
        self.states: list[EditorState] = []
        self.accepted: list[EditorState] = []

    async def open(self, state: EditorState, others: Sequence[Source]) -> None:
        self.states.append(state)

    def on_text(self, state: EditorState) -> None:
        self.states.append(state)
        self.spawn(self._answer(state))

    def on_accept(self, state: EditorState) -> None:
        self.accepted.append(state)
        super().on_accept(state)

    async def _answer(self, state: EditorState) -> None:
        await self.clock.sleep(self.delay_s)
        self.offer(state.version, self.suggest(state))


def scene(
    typed: str, before: str = "import os\n", after: str = "\nend()\n", old: str = ""
) -> Scene:
    source = Source("demo", "1", "MIT", "demo.py", "0" * 64, before + typed + after)
    return Scene("demo-line", "line", source, len(before), old, typed)
