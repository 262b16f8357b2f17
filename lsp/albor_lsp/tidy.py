"""The ending of a suggestion: nothing twice, no loose brackets, the file's own indentation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["Indent", "indent_of", "tidy"]

_PAIRS: Final = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True, slots=True)
class Indent:
    """How a file indents."""

    uses_tabs: bool = False
    width: int = 4
    """Columns of one level."""


def indent_of(lines: Iterable[str]) -> Indent:
    """What most indented lines of a file begin with; four spaces where none is indented."""
    num_tabs, widths = 0, []
    for line in lines:
        if line.startswith("\t"):
            num_tabs += 1
        elif line.startswith(" ") and line.strip():
            widths.append(len(line) - len(line.lstrip(" ")))
    if num_tabs > len(widths):
        return Indent(uses_tabs=True)
    for width in (4, 2, 8, 3):
        if widths and sum(each % width == 0 for each in widths) > 0.9 * len(widths):
            return Indent(width=width)
    return Indent()


def tidy(text: str, before: str, after: str, indent: Indent) -> str | None:
    """What to show of a model's answer; None for nothing.

    Args:
        text: the answer.
        before: the text before the cursor.
        after: the text after it.
        indent: the file's.
    """
    text = _indented(text.replace("\r\n", "\n").replace("\r", "\n"), indent)
    rest, _, following = after.replace("\r\n", "\n").partition("\n")
    text = _without_next_lines(text, following)
    text = _without_rest(text, rest)
    text = _balanced(text, before, rest)
    text = text.rstrip()
    if not text.strip() or text.strip() == rest.strip():
        return None
    if not text.startswith("\n") and _ends_blank(before):
        text = text.lstrip(" \t") if _line_of(before).strip() else text
    return text or None


def _ends_blank(before: str) -> bool:
    return before.endswith((" ", "\t"))


def _line_of(before: str) -> str:
    return before[max(before.rfind("\n"), before.rfind("\r")) + 1 :]


def _indented(text: str, indent: Indent) -> str:
    """Leading blanks of all lines but the first in the file's kind."""
    if "\n" not in text:
        return text
    if indent.uses_tabs:
        if "\n " not in text:
            return text

        def to_tabs(match: re.Match[str]) -> str:
            blanks = match[0][1:].expandtabs(4)
            return "\n" + "\t" * (len(blanks) // 4) + " " * (len(blanks) % 4)

        return re.sub(r"\n[ \t]+", to_tabs, text)
    if "\n\t" not in text:
        return text
    return re.sub(r"\n[ \t]+", lambda match: match[0].expandtabs(indent.width), text)


def _without_next_lines(text: str, following: str) -> str:
    """Cut where the answer goes on with the line that follows the cursor anyway."""
    next_line = next((line.strip() for line in following.split("\n") if line.strip()), "")
    if sum(char.isalnum() for char in next_line) < 3:
        return text
    lines = text.split("\n")
    for at, line in enumerate(lines[1:], start=1):
        if line.strip() == next_line:
            return "\n".join(lines[:at])
    return text


def _without_rest(text: str, rest: str) -> str:
    """Cut what already stands between the cursor and the end of its line."""
    rest = rest.rstrip()
    if not rest:
        return text
    first = text.partition("\n")[0].rstrip()
    # With code after the cursor only one line can be inserted without tearing it from its own.
    if first.endswith(rest):
        return first[: len(first) - len(rest)]
    head = rest.lstrip()
    if len(head) > 2 and head in first:
        return first[: first.index(head)]
    return first


def _balanced(text: str, before: str, rest: str) -> str:
    """Cut the first closing bracket that neither the answer nor its line has opened.

    Brackets after the cursor in its line are taken as the partners of those before it.
    """
    opened = [char for char in _line_of(before) if char in "([{"]
    if not rest.strip():
        return text
    missing = [char for char in rest if char in _PAIRS]
    stack: list[str] = []
    for at, char in enumerate(text):
        if char in "([{":
            stack.append(char)
        elif char in _PAIRS:
            if stack:
                stack.pop()
            elif missing and len(opened) <= len(missing):
                return text[:at]
    return text
