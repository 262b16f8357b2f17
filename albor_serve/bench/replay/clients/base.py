"""The interface between the simulated person and a completion client."""

from __future__ import annotations

import abc
import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from albor_serve.bench.replay.scenes import Source

__all__ = ["Client", "EditorState", "Ghost", "RequestRecord", "Work"]


@dataclass(frozen=True, slots=True)
class EditorState:
    """The file and the cursor after a change."""

    path: str
    before: str
    after: str
    version: int
    """Counts changes; ghost text belongs to one version."""


@dataclass(frozen=True, slots=True)
class Ghost:
    """Suggested text to insert at the cursor of a version."""

    version: int
    text: str


@dataclass(slots=True)
class RequestRecord:
    """What one answered request cost, as the server told it."""

    num_prompt: int
    num_new_prompt: int
    """Prompt tokens that were not in the cache."""
    num_decoded: int
    is_shown: bool = False


@dataclass(slots=True)
class Work:
    """What a client asked of its server."""

    num_requests: int = 0
    num_cancelled: int = 0
    """Closed by the client before their answer."""
    answers: list[RequestRecord] = field(default_factory=list)


class Client(abc.ABC):
    """Gets text changes, offers ghost text through `on_ghost`. Lives in one event loop."""

    editor_keeps_ghost = True
    """Whether the editor goes on showing ghost text while typing agrees with it, as VS Code does;
    otherwise every key takes it off the screen and the client must offer it again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work = Work()
        self.on_ghost: Callable[[Ghost], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    async def start(self) -> None:  # noqa: B027 - most need none
        """Before the first scene."""

    async def stop(self) -> None:  # noqa: B027
        """After the last one."""

    def cpu_seconds(self) -> float:
        """CPU time used so far, of this process unless the client has one of its own."""
        return time.process_time()

    @abc.abstractmethod
    async def open(self, state: EditorState, others: Sequence[Source]) -> None:
        """A scene begins: the file, and what else is open."""

    @abc.abstractmethod
    def on_text(self, state: EditorState) -> None:
        """A key was pressed. Returns at once."""

    def on_accept(self, state: EditorState) -> None:
        """Ghost text was taken over; `state` holds it already."""
        self.on_text(state)

    async def close_scene(self) -> None:
        """The scene ends: nothing is in flight afterwards.

        Raises:
            AlborError: a request of the scene failed.
        """
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run something until the scene ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()

    def offer(self, version: int, text: str) -> None:
        """Show ghost text."""
        if self.on_ghost is not None:
            self.on_ghost(Ghost(version, text))
