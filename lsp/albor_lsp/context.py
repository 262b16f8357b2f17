"""What the model reads: a window around the cursor, and pieces of other files.

The window's ends move in blocks of lines, never with each key, so that a server's KV cache of the
last prompt stays good while a person types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Chunk", "ContextBuilder", "Window"]

BLOCK_LINES: Final = 32
PREFIX_SHARE: Final = 0.75


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of another file."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Window:
    """The text around a cursor that a request carries.

    Attributes:
        generation: of the context from other files; answers of another one are stale.
    """

    prefix: str
    suffix: str
    generation: int


class ContextBuilder:
    """Follows what the person opens and edits. Used from one thread; nothing here blocks.

    Attributes:
        generation: changes exactly when the chunks of other files do.
    """

    def __init__(self, root: Path | None, *, max_chars: int, other_files: bool) -> None:
        self.root = root
        self.generation = 0
        self._max_prefix = int(max_chars * PREFIX_SHARE)
        self._max_suffix = max_chars - self._max_prefix
        self._other_files = other_files

    def opened(self, path: str, text: str, language: str) -> None:
        """A file was opened."""

    def edited(self, path: str, text: Callable[[], str], line: int) -> None:
        """A file was changed at a line."""

    def saved(self, path: str, text: str) -> None:
        """A file was saved."""

    def jumped(self, path: str, line: int) -> None:
        """The cursor went to a far line."""

    def window(self, lines: Sequence[str], line: int, column: int) -> Window:
        """The text around a cursor, whole lines at both ends where they are not too long."""
        head = lines[line][:column]
        prefix = _before(lines, line, head, self._max_prefix)
        suffix = _after(lines, line, lines[line][column:], self._max_suffix)
        return Window(prefix, suffix, self.generation)

    def chunks(self, path: str, prefix: str, suffix: str) -> tuple[Chunk, ...]:  # noqa: ARG002
        """Pieces of other files, most stable first."""
        return ()


def _before(lines: Sequence[str], line: int, head: str, limit: int) -> str:
    """The text from a line whose number is a multiple of the block's up to the cursor."""
    if len(head) > limit:
        # One endless line: its start moves in blocks too.
        step = max(1, limit // 2)
        return head[(len(head) - limit + step - 1) // step * step :]
    start = size = 0
    fits = line
    size = len(head)
    for start in range(line - 1, -1, -1):
        size += len(lines[start])
        if size > limit:
            break
        fits = start
    if fits > 0:
        anchored = -(-fits // BLOCK_LINES) * BLOCK_LINES
        fits = anchored if anchored <= line else fits
    return "".join(lines[fits:line]) + head


def _after(lines: Sequence[str], line: int, tail: str, limit: int) -> str:
    """The text from the cursor to a line whose distance from the file's end is anchored."""
    if len(tail) > limit:
        return tail[:limit]
    total = len(lines)
    size, fits = len(tail), line + 1
    while fits < total and size + len(lines[fits]) <= limit:
        size += len(lines[fits])
        fits += 1
    if fits < total:
        left = -(-(total - fits) // BLOCK_LINES) * BLOCK_LINES
        fits = total - left if total - left > line else fits
    return tail + "".join(lines[line + 1 : fits])
