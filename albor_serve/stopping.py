"""From bytes to showable text: whole characters, and nothing of a stop string.

A token may end inside a UTF-8 character and a stop string may span tokens, so some bytes have to
wait. `TextAssembler` releases text as soon as it is certain and never takes any back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from albor_serve.errors import RequestError

__all__ = ["IndentGuard", "TextAssembler"]


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


class IndentGuard:
    """Ends an answer before a line that is indented less than it must be.

    A line's end is held back with the blank lines and the indentation after it until the line
    that follows shows its first character, so that text that ends an answer is never shown.
    """

    def __init__(self, min_indent: int) -> None:
        """`min_indent` counts spaces and tabs, one each; 0 lets every line pass."""
        self._min_indent = min_indent
        self._held = ""
        self._is_done = False

    @property
    def is_done(self) -> bool:
        """Whether a line with too little indentation has begun."""
        return self._is_done

    def feed(self, text: str) -> str:
        """Add text; return what is certain to be shown. After the end: always ""."""
        if self._is_done or self._min_indent == 0:
            return "" if self._is_done else text
        self._held += text
        released = ""
        while (line_end := self._held.find("\n")) >= 0:
            rest = self._held[line_end:]
            code = rest.lstrip(" \t\r\n")
            if not code:
                break
            gap = rest[: len(rest) - len(code)]
            if len(gap) - gap.rfind("\n") - 1 < self._min_indent:
                released += self._held[:line_end].removesuffix("\r")
                self._held = ""
                self._is_done = True
                return released
            # Up to the next line end nothing can change any more.
            stop = line_end + len(gap)
            released, self._held = released + self._held[:stop], self._held[stop:]
        keep = self._held.find("\n")
        if keep < 0:
            keep = len(self._held) - self._held.endswith("\r")
        elif keep > 0 and self._held[keep - 1] == "\r":
            keep -= 1
        released, self._held = released + self._held[:keep], self._held[keep:]
        return released

    def flush(self) -> str:
        """Text still held back, once it is known that nothing more comes."""
        released, self._held = self._held, ""
        return "" if self._is_done else released
