r"""An open document, kept equal to the editor's copy by its incremental edits.

Lines end where LSP says, at `\n`, `\r\n` and `\r`, and nowhere else: `str.splitlines` also
splits at form feeds and Unicode separators, and each edit after one would land in a wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["Change", "Document", "Encoding", "Point", "Position", "split_lines", "to_changes"]

Encoding = Literal["utf-8", "utf-16", "utf-32"]
"""The unit in which a client counts characters of a line."""

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Position(NamedTuple):
    """A place as the client says it: zero-based line, and units of its encoding in the line."""

    line: int
    character: int


class Point(NamedTuple):
    """A place in code points: zero-based line and column."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Change:
    """One edit; without `start` and `end` the text replaces the whole document."""

    text: str
    start: Position | None = None
    end: Position | None = None


def to_changes(content_changes: Sequence[dict[str, Any]]) -> list[Change]:
    """The `contentChanges` of a didChange notification.

    Raises:
        KeyError, TypeError, ValueError: they don't have LSP's shape.
    """
    changes = []
    for item in content_changes:
        span = item.get("range")
        text = item["text"]
        if not isinstance(text, str):
            raise TypeError("the text of a change is not a string")
        if span is None:
            changes.append(Change(text))
            continue
        start, end = span["start"], span["end"]
        changes.append(
            Change(
                text,
                Position(int(start["line"]), int(start["character"])),
                Position(int(end["line"]), int(end["character"])),
            )
        )
    return changes


def split_lines(text: str) -> list[str]:
    """Lines with their ends; the last one has none and may be empty."""
    lines = _LINE.findall(text)
    if not lines or lines[-1][-1] in "\r\n":
        lines.append("")
    return lines


class Document:
    """The text of one open file. Only `apply` changes it.

    Attributes:
        lines: with their ends; never empty; the last one has no end.
        version: the client's, of the last change.
    """

    def __init__(self, uri: str, language: str, text: str, version: int = 0) -> None:
        self.uri = uri
        self.language = language
        self.version = version
        self.lines = split_lines(_joined(text))
        self._text: str | None = None

    @property
    def text(self) -> str:
        """The whole text; O(document) after a change."""
        if self._text is None:
            self._text = "".join(self.lines)
        return self._text

    def offset(self, point: Point) -> int:
        """Where a point is in `text`."""
        return sum(map(len, self.lines[: point.line])) + point.column

    def apply(self, changes: Sequence[Change], encoding: Encoding, version: int = 0) -> Point:
        """Carry out edits in order; returns the end of the last one.

        The work is proportional to the edited lines, but for moving the list's pointers.
        """
        self.version = version
        self._text = None
        end = Point(0, 0)
        for change in changes:
            if change.start is None or change.end is None:
                self.lines = split_lines(_joined(change.text))
                end = Point(len(self.lines) - 1, len(self.lines[-1]))
            else:
                first = self.point(change.start, encoding)
                last = self.point(change.end, encoding)
                end = self._replace(min(first, last), max(first, last), change.text)
        return end

    def point(self, position: Position, encoding: Encoding) -> Point:
        """A client's position in code points.

        Beyond a line's end it is the end before the line break; beyond the last line, the end of
        the text; inside a character, before it.
        """
        line = max(position.line, 0)
        if line >= len(self.lines):
            return Point(len(self.lines) - 1, len(self.lines[-1]))
        content = self.lines[line].rstrip("\r\n")
        return Point(line, _column(content, max(position.character, 0), encoding))

    def position(self, point: Point, encoding: Encoding) -> Position:
        """A point as the client counts it. The inverse of `point`."""
        content = self.lines[point.line].rstrip("\r\n")[: point.column]
        return Position(point.line, _units(content, encoding))

    def end(self) -> Point:
        """The end of the text."""
        return Point(len(self.lines) - 1, len(self.lines[-1]))

    def _replace(self, start: Point, end: Point, text: str) -> Point:
        head = self.lines[start.line][: start.column]
        tail = self.lines[end.line][end.column :]
        first = start.line
        # A line break typed right after a carriage return makes one break of two.
        if not head and first > 0 and self.lines[first - 1].endswith("\r"):
            first -= 1
            head = self.lines[first]
        upto = head + text
        fresh = split_lines(_joined(upto + tail))
        if not fresh[-1] and tail.endswith(("\r", "\n")):
            fresh.pop()
        self.lines[first : end.line + 1] = fresh
        before = split_lines(_joined(upto))
        line, column = first + len(before) - 1, len(before[-1])
        if line >= len(self.lines):
            return self.end()
        return Point(line, min(column, len(self.lines[line].rstrip("\r\n"))))


def _joined(text: str) -> str:
    """Surrogate pairs that came apart, as one character each."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _column(content: str, units: int, encoding: Encoding) -> int:
    if encoding == "utf-32" or content.isascii():
        return min(units, len(content))
    if encoding == "utf-8":
        data = content.encode("utf-8", "surrogatepass")
        units = min(units, len(data))
        while 0 < units < len(data) and data[units] & 0xC0 == 0x80:
            units -= 1
        return len(data[:units].decode("utf-8", "surrogatepass"))
    data = content.encode("utf-16-le", "surrogatepass")
    if len(data) == 2 * len(content):
        return min(units, len(content))
    units = min(units, len(data) // 2)
    splits_pair = (
        0 < units < len(data) // 2
        and 0xDC <= data[2 * units + 1] <= 0xDF
        and 0xD8 <= data[2 * units - 1] <= 0xDB
    )
    return len(data[: 2 * (units - splits_pair)].decode("utf-16-le", "surrogatepass"))


def _units(content: str, encoding: Encoding) -> int:
    if encoding == "utf-32" or content.isascii():
        return len(content)
    if encoding == "utf-8":
        return len(content.encode("utf-8", "surrogatepass"))
    return len(content.encode("utf-16-le", "surrogatepass")) // 2
