"""Recent pieces of other files, in an order that later pieces never change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["Chunk", "Ring"]

CHUNK_LINES: Final = 64
MAX_SIMILARITY: Final = 0.9


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a file."""

    path: str
    text: str


class Ring:
    """At most `max_chunks` pieces, oldest first; the oldest leave `num_evicted` at a time.

    So the start of the list, and with it the server's KV cache, stays valid as pieces are added.
    """

    def __init__(self, max_chunks: int = 16, num_evicted: int = 4) -> None:
        self._max_chunks = max_chunks
        self._num_evicted = min(num_evicted, max_chunks)
        self._chunks: list[tuple[Chunk, frozenset[str]]] = []

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The pieces, oldest first."""
        return tuple(chunk for chunk, _ in self._chunks)

    def add(self, path: str, text: str, line: int) -> bool:
        """Takes in up to 64 lines around `line` (from 0), unless a like piece is there."""
        lines = text.split("\n")
        # Whole steps of half a chunk: nearby cursors then give the same piece.
        step = CHUNK_LINES // 2
        start = max(0, min(line, len(lines) - 1) // step * step - step // 2)
        piece = "\n".join(lines[start : start + CHUNK_LINES]).strip("\n")
        words = frozenset(stripped for each in piece.split("\n") if (stripped := each.strip()))
        if len(words) < 3 or any(
            _similarity(words, old) > MAX_SIMILARITY for _, old in self._chunks
        ):
            return False
        if len(self._chunks) >= self._max_chunks:
            del self._chunks[: self._num_evicted]
        self._chunks.append((Chunk(path, piece), words))
        return True

    def drop(self, is_unwanted: Callable[[Chunk], bool]) -> bool:
        """Removes pieces; says whether there were any."""
        kept = [pair for pair in self._chunks if not is_unwanted(pair[0])]
        changed = len(kept) < len(self._chunks)
        self._chunks = kept
        return changed


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))
