"""From bytes to showable text: whole characters, and nothing of a stop string.

A token may end inside a UTF-8 character and a stop string may span tokens, so some bytes have to
wait. `TextAssembler` releases text as soon as it is certain and never takes any back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from albor_serve.errors import RequestError

__all__ = ["TextAssembler"]


class TextAssembler:
    """Turns the bytes of successive tokens into text that is safe to show.

    Bytes that are not UTF-8 become U+FFFD. An unfinished character at the very end is dropped:
    it is not text, and an editor must never receive half of one.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if any(not s for s in stop):
            raise RequestError("a stop string is empty: leave it out", param="stop")
        self._stop = tuple(dict.fromkeys(stop))
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._stopped_by: str | None = None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was found, or None."""
        return self._stopped_by

    def feed(self, data: bytes) -> str:
        """Add bytes; return the text that is certain now. After a stop string: always ""."""
        if self._stopped_by is not None:
            return ""
        text = self._decoder.decode(data)
        if not self._stop:
            return text
        self._held += text
        found = self._find_stop()
        if found is not None:
            start, self._stopped_by = found
            released, self._held = self._held[:start], ""
            return released
        keep = self._longest_possible_stop()
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def flush(self) -> str:
        """Text still held back, once it is known that nothing more comes."""
        released, self._held = self._held, ""
        return "" if self._stopped_by is not None else released

    def _find_stop(self) -> tuple[int, str] | None:
        """Where the earliest stop string in the held text starts, and which it is.

        Of two that start together the shorter wins: it was complete first.
        """
        hits = [(at, len(s), s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if not hits:
            return None
        start, _, stop = min(hits)
        return start, stop

    def _longest_possible_stop(self) -> int:
        """Length of the longest end of the held text that may grow into a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
