"""What of the workspace goes into a request: a window of the file and pieces of others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from albor_lsp.ignore import IgnoreRules, holds_secret
from albor_lsp.imports import ImportIndex
from albor_lsp.ring import Chunk, Ring

__all__ = ["Chunk", "ContextBuilder", "ContextSettings", "Window"]

ANCHOR_LINES: Final = 64
ANCHOR_CHARS: Final = 4096
JUMP_LINES: Final = 32
RECHECK_S: Final = 1.0
"""How long what the disk said of ignored files and imports is believed."""


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """Sizes of what is sent."""

    prefix_lines: int = 256
    """Lines before the cursor, and up to 63 more."""
    suffix_lines: int = 64
    """Lines after the cursor, and up to 63 more."""
    max_window_chars: int = 32_768
    """On each side; guards against files of long lines."""
    max_ring_chunks: int = 16
    max_context_tokens: int = 1024
    """Of other files' pieces."""
    bytes_per_token: float = 3.0
    """An estimate for code, on the low side so that the budget holds."""


@dataclass(frozen=True, slots=True)
class Window:
    """The code around the cursor."""

    prefix: str
    suffix: str
    generation: int
    """The context's generation when the window was made."""


class ContextBuilder:
    """Follows the editor's events; gives the window and the other files' pieces of a request.

    Not safe for several threads: one event loop owns it.
    """

    def __init__(
        self,
        root: Path | None,
        settings: ContextSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root.resolve() if root is not None else None
        self._settings = settings or ContextSettings()
        self._rules = IgnoreRules(self._root)
        self._ring = Ring(self._settings.max_ring_chunks)
        self._imports = ImportIndex(self._root)
        self._texts: dict[str, Callable[[], str]] = {}
        self._lines: dict[str, int] = {}
        self._generation = 0
        self._clock = clock
        self._last: tuple[str, float, int, tuple[Chunk, ...]] = ("", float("-inf"), -1, ())

    @property
    def generation(self) -> int:
        """Grows when the pieces of other files have changed."""
        return self._generation

    def allows(self, path: str, text: str) -> bool:
        """Whether anything of a file may be sent: no secret's name, no key in its text."""
        return not self._rules.excludes(path) and not holds_secret(text)

    def opened(self, path: str, text: str, language: str) -> None:
        """A document was opened."""
        del language  # pieces are chosen alike in every language
        self._texts[path] = lambda: text
        self._add(path, text, 0)

    def edited(self, path: str, text_getter: Callable[[], str], line: int) -> None:
        """A document changed at `line` (from 0); its text is read only if a piece is taken."""
        self._texts[path] = text_getter
        self._moved(path, line)

    def saved(self, path: str, text: str) -> None:
        """A document was saved: its old pieces give way to what was edited last."""
        self._texts[path] = lambda: text
        self._add(path, text, self._lines.get(path, 0))

    def jumped(self, path: str, line: int) -> None:
        """The cursor moved; a jump of more than 32 lines remembers the place it left."""
        self._moved(path, line)

    def _moved(self, path: str, line: int) -> None:
        earlier = self._lines.get(path)
        self._lines[path] = line
        if earlier is not None and abs(line - earlier) > JUMP_LINES and path in self._texts:
            self._add(path, self._texts[path](), earlier)

    def _add(self, path: str, text: str, line: int) -> None:
        if self.allows(path, text) and self._ring.add(self._name(path), text, line):
            self._generation += 1

    def _name(self, path: str) -> str:
        if self._root is not None:
            full = self._root / path
            if full.is_relative_to(self._root):
                return full.relative_to(self._root).as_posix()
        return path.replace("\\", "/").rpartition("/")[2]

    def window(self, text: str, offset: int) -> Window:
        """The window around `offset` (characters), whose ends move 64 lines at a time."""
        offset = max(0, min(offset, len(text)))
        settings = self._settings
        line = text.count("\n", 0, offset)
        first = max(0, line - settings.prefix_lines) // ANCHOR_LINES * ANCHOR_LINES
        start = offset
        for _ in range(line - first + 1):
            start = text.rfind("\n", 0, start)
        start += 1
        if offset - start > settings.max_window_chars:
            start = -(-(offset - settings.max_window_chars) // ANCHOR_CHARS) * ANCHOR_CHARS
            start = min(start, offset)
        # Counted from the end of the file: a line typed above must not move the suffix's end,
        # because models that read the suffix first would have to read everything again.
        num_after = text.count("\n", offset)
        num_left = max(0, num_after - settings.suffix_lines) // ANCHOR_LINES * ANCHOR_LINES
        end = offset
        for _ in range(num_after - num_left):
            end = text.find("\n", end) + 1
        end = end if num_left else len(text)
        end = min(end, offset + settings.max_window_chars)
        return Window(text[start:offset], text[offset:end], self._generation)

    def chunks(self, path: str, text: str, offset: int) -> tuple[Chunk, ...]:
        """Pieces of other files, the most stable first, within the token budget.

        A call within 1 s of the last one for the same file does no work unless pieces changed.

        Definitions of imported names come first, then recent pieces, oldest first.
        """
        del offset  # pieces that followed the cursor would spoil the server's cache
        now = self._clock()
        last_path, last_s, generation, chunks = self._last
        is_fresh = now - last_s < RECHECK_S
        if last_path == path and generation == self._generation and is_fresh:
            return chunks
        chunks = self._collect(path, text)
        # After the work, which may itself have changed the generation.
        self._last = (path, now, self._generation, chunks)
        return chunks

    def _collect(self, path: str, text: str) -> tuple[Chunk, ...]:
        if self._rules.excludes(path):
            return ()
        if self._ring.drop(lambda chunk: self._rules.excludes(chunk.path)):
            self._generation += 1
        own = self._name(path)
        room = int(self._settings.max_context_tokens * self._settings.bytes_per_token)
        kept: list[Chunk] = []
        if path.endswith((".py", ".pyi")):
            for chunk in self._imports.chunks(path, text):
                size = len(chunk.text.encode("utf-8", "replace"))
                if size <= room // 2 and self.allows(chunk.path, chunk.text):
                    kept.append(chunk)
                    room -= size
        recent: list[Chunk] = []
        for chunk in reversed(self._ring.chunks):
            size = len(chunk.text.encode("utf-8", "replace"))
            if chunk.path == own or size > room:
                continue
            room -= size
            recent.insert(0, chunk)
        return (*kept, *recent)
