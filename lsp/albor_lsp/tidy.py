"""What is shown of an answer: without what already stands after the cursor, and well-formed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

__all__ = ["Indent", "detect_indent", "tidy"]

MIN_WORD_CHARS: Final = 3
"""Lines with fewer letters and digits (a bracket, `fi`) repeat by chance."""
MAX_LOOK_CHARS: Final = 6144
"""How much code on each side of the cursor is read."""
MAX_LOOP_LINES: Final = 4
_OPENERS: Final = {"(": ")", "[": "]", "{": "}"}
_CLOSERS: Final = frozenset(_OPENERS.values())
_STUTTER: Final = re.compile(r"(?=[^\n]*\w{3})([^\n]{6,60}?)\1\1")
"""Three times the same thing in one line: a small model that has lost its way."""
_TOKENS: Final = re.compile(r"\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|[()\[\]{}]")


@dataclass(frozen=True, slots=True)
class Indent:
    """A file's indentation: tabs, or `width` spaces a level (a tab stands for `width` spaces)."""

    use_tabs: bool = False
    width: int = 4


def detect_indent(text: str, default: Indent = Indent()) -> Indent:
    """The indentation of a file by its first 6144 characters, or `default` where none shows."""
    leads = re.findall(r"^([ \t]+)\S", text[:MAX_LOOK_CHARS], re.MULTILINE)
    tabs = sum(lead[0] == "\t" for lead in leads)
    if tabs * 2 > len(leads):
        return Indent(True, default.width)
    widths = [len(lead) for lead in leads if lead[0] == " " and len(lead) > 1]
    return Indent(False, min(8, min(widths))) if widths else default


def tidy(text: str, before: str, after: str, indent: Indent) -> str | None:
    """The part of an answer that is worth showing, or None; its line ends are line feeds.

    `before` and `after` are the code around the cursor, at least their nearest lines.
    """
    before = before[-MAX_LOOK_CHARS:].replace("\r\n", "\n")
    after = after[:MAX_LOOK_CHARS].replace("\r\n", "\n")
    line_start = before.rpartition("\n")[2]
    text = _indented(text.replace("\r\n", "\n").replace("\r", "\n"), line_start, indent)
    # Each cut can bring another repetition to the end. Cuts only shorten, so this ends.
    while True:
        shorter = _trim(text, before, after)
        if shorter == text:
            break
        text = shorter
    return text if text.strip() else None


def _trim(text: str, before: str, after: str) -> str:
    rest, _, below = after.partition("\n")
    text = _without_rest(text, rest)
    text = _without_stutter(text)
    text = _without_loops(text, before)
    text = _without_following(text, before.rpartition("\n")[2], below)
    text = _balanced(text, before, after)
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip()


def _num_word_chars(text: str) -> int:
    return sum(map(str.isalnum, text))


def _indented(text: str, line_start: str, indent: Indent) -> str:
    first, *others = text.split("\n")
    if not line_start.strip():
        first = _reindent(first, indent)
    return "\n".join([first, *(_reindent(line, indent) for line in others)])


def _reindent(line: str, indent: Indent) -> str:
    body = line.lstrip(" \t")
    lead = line[: len(line) - len(body)]
    if indent.use_tabs:
        columns = len(lead.expandtabs(indent.width))
        return "\t" * (columns // indent.width) + " " * (columns % indent.width) + body
    return lead.expandtabs(indent.width) + body


def _without_rest(text: str, rest: str) -> str:
    """Cuts what repeats the rest of the cursor's line; goes over lines only before closers."""
    rest = rest.rstrip()
    if not rest.strip():
        return text
    if any(char not in ")]};,:\"'`> " for char in rest):
        text = text.partition("\n")[0]
    lines = text.rstrip().split("\n")
    for at, line in enumerate(lines):
        # Before a closer, a line that ends with the rest is where the answer met what follows.
        if line.endswith(rest) and (at in (0, len(lines) - 1)):
            return "\n".join([*lines[:at], line[: -len(rest)]])
    text = "\n".join(lines)
    for length in range(min(len(rest), len(text)) - 1, 0, -1):
        overlap = rest[:length]
        if _num_word_chars(overlap) >= MIN_WORD_CHARS and text.endswith(overlap):
            return text[:-length]
    return text


def _without_stutter(text: str) -> str:
    """Cuts where the same six characters or more, with a word in them, come three times."""
    for match in _STUTTER.finditer(text):
        if _num_word_chars(match[1]) >= MIN_WORD_CHARS:
            return text[: match.start()]
    return text


def _without_loops(text: str, before: str) -> str:
    """Cuts lines that repeat the ones just above, one to four lines at a time."""
    *above, start = before.split("\n")
    first, *others = text.split("\n")
    context = above[-MAX_LOOP_LINES:]
    lines = [*context, start + first, *others]
    for end in range(len(context) + 1, len(lines) + 1):
        for period in range(1, MAX_LOOP_LINES + 1):
            again = [line.rstrip() for line in lines[end - period : end]]
            earlier = [line.rstrip() for line in lines[max(0, end - 2 * period) : end - period]]
            is_old = end - period < len(context)
            if is_old or again != earlier or _num_word_chars("".join(again)) < MIN_WORD_CHARS:
                continue
            num_kept = end - period - len(context)
            return "\n".join(text.split("\n")[:num_kept])
    return text


def _without_following(text: str, line_start: str, below: str) -> str:
    """Cuts from the line on that repeats the next line of the file, and a tail of such lines."""
    following = [line.rstrip() for line in below.split("\n") if line.strip()]
    if not following:
        return text
    lines = text.split("\n")
    whole = [line.rstrip() for line in (line_start + lines[0], *lines[1:])]
    if _num_word_chars(following[0]) >= MIN_WORD_CHARS and following[0] in whole:
        return "\n".join(lines[: whole.index(following[0])])
    for length in range(min(len(whole) - 1, len(following)), 0, -1):
        if whole[-length:] == following[:length]:
            return "\n".join(lines[:-length])
    return text


def _unmatched(text: str) -> tuple[list[str], list[tuple[int, str]]]:
    """(closers that open brackets ask for, unmatched closers with their places)."""
    wanted: list[str] = []
    extra: list[tuple[int, str]] = []
    for match in _TOKENS.finditer(text):
        token = match.group()
        if token in _OPENERS:
            wanted.append(_OPENERS[token])
        elif token in _CLOSERS:
            if wanted and wanted[-1] == token:
                wanted.pop()
            else:
                extra.append((match.start(), token))
    return wanted, extra


def _balanced(text: str, before: str, after: str) -> str:
    """Cuts at the first closer that the code after the cursor already has."""
    _, closers = _unmatched(text)
    if not closers:
        return text
    wanted, _ = _unmatched(before)
    _, following = _unmatched(after)
    if not following:
        return text
    num_allowed = max(0, len(wanted) - len(following))
    return text[: closers[num_allowed][0]] if len(closers) > num_allowed else text
