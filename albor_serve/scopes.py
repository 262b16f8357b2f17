"""Where a suggestion ends: at its line, its block, its scope, or where it repeats what follows.

A model goes on until it runs out of tokens, but a person wants one thing at a time. `ScopeGuard`
reads an answer as it comes and ends it at the first place where the asked scope is over, so that
no decode time is spent on text that an editor would have to cut. It knows no grammar: brackets,
indentation, strings and comments are enough in nearly all languages.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

__all__ = ["Ending", "LexerMemo", "ScopeGuard", "StopScope", "Style", "style_of"]

StopScope = Literal["line", "block", "scope", "none"]
"""line: one line. block: the statement that the cursor's line begins, or else the paragraph.
scope: what is left of the enclosing brackets or indentation. none: as long as the model goes."""

Ending = Literal["line", "block", "scope", "suffix"]
"""Why an answer was ended: its scope was over, or it repeated the code after the cursor."""

_OPENERS: Final = {"(": ")", "[": "]", "{": "}"}
_CLOSERS: Final = frozenset(_OPENERS.values())

MAX_LOOK_CHARS: Final = 6144
"""How much of the code around the cursor is read; farther brackets count as not there."""
LOOK_STEP_CHARS: Final = 1024
MIN_REPEAT_WORD_CHARS: Final = 3
"""A following line with fewer letters and digits (a bracket, `fi`) repeats by chance."""
TAB_WIDTH: Final = 4


@dataclass(frozen=True, slots=True)
class Style:
    """What a language family writes around text that is not code."""

    line_comments: tuple[str, ...]
    block_comments: tuple[tuple[str, str], ...] = ()
    quotes: str = "\"'"
    """Characters that begin a string of one line."""
    long_quotes: tuple[str, ...] = ()
    """Spellings that begin and end a string of many lines."""
    has_directives: bool = False
    """Whether lines that begin with # are the preprocessor's and keep no indentation."""


_C_COMMENT: Final = (("/*", "*/"),)
_PYTHON: Final = Style(("#",), long_quotes=('"""', "'''"))
_SCRIPT: Final = Style(("//",), _C_COMMENT, long_quotes=("`",))
_C: Final = Style(("//",), _C_COMMENT, has_directives=True)
_RUST: Final = Style(("//",), _C_COMMENT, quotes='"')
_MARKUP: Final = Style((), (("<!--", "-->"),), quotes='"')
_HASH: Final = Style(("#",))
_DASHES: Final = Style(("--",), (("/*", "*/"), ("--[[", "]]")))

_BY_EXTENSION: Final = {
    **dict.fromkeys(("py", "pyi", "pyx"), _PYTHON),
    **dict.fromkeys(("js", "jsx", "mjs", "cjs", "ts", "tsx", "go", "kt", "swift", "dart"), _SCRIPT),
    **dict.fromkeys(("java", "scala", "groovy"), Style(("//",), _C_COMMENT, long_quotes=('"""',))),
    **dict.fromkeys(("c", "h", "cc", "cpp", "cxx", "hpp", "hh", "cu", "cs", "m", "mm"), _C),
    "rs": _RUST,
    **dict.fromkeys(("html", "htm", "xml", "svg", "vue", "svelte", "md"), _MARKUP),
    **dict.fromkeys(("yaml", "yml", "toml", "sh", "bash", "rb", "r", "jl", "tf"), _HASH),
    **dict.fromkeys(("css", "scss", "less"), Style((), _C_COMMENT)),
    "php": Style(("//", "#"), _C_COMMENT),
    **dict.fromkeys(("sql", "lua", "hs"), _DASHES),
}

_LOOKS = (
    (_MARKUP, re.compile(r"^\s*(?:<[!?/]?[a-zA-Z][^()\n]*>|<!--)", re.MULTILINE)),
    (_RUST, re.compile(r"^\s*(?:pub )?(?:fn|impl|use|mod|let mut) |&'|->.*\{$", re.MULTILINE)),
    (
        _PYTHON,
        re.compile(
            r"^\s*(?:(?:def|class|for|if|while|with) .*:\s*$|from \S+ import |\"\"\")", re.MULTILINE
        ),
    ),
    (_C, re.compile(r"^\s*#\s*(?:include|define|if|pragma)", re.MULTILINE)),
    (_SCRIPT, re.compile(r"[{;]\s*$|^\s*//|=>", re.MULTILINE)),
    (_HASH, re.compile(r"^\s*(?:- )?[\w.-]+:(?:\s|$)|^#", re.MULTILINE)),
)
"""How code looks whose path is not known; the first that fits."""


def style_of(path: str | None, code: str) -> Style:
    """The style of a file by its path's extension, or else by the look of its code."""
    if path is not None:
        extension = PurePosixPath(path.replace("\\", "/")).suffix.lower().removeprefix(".")
        if extension in _BY_EXTENSION:
            return _BY_EXTENSION[extension]
    return next((style for style, look in _LOOKS if look.search(code)), _PYTHON)


@dataclass(frozen=True, slots=True)
class _Open:
    """A bracket that is open."""

    closer: str
    indent: int
    """Indentation of its line."""
    line: int
    """Number of its line."""
    number: int
    """Tells it from others on its line."""


_RUN: Final = re.compile(r"\w+| +|.", re.DOTALL)
"""A word, spaces, or one other character; only the last can begin or end anything."""


class _Lexer:
    """Brackets, strings and comments of code that comes one character at a time."""

    def __init__(self, style: Style) -> None:
        self._style = style
        self._ends_at: str | None = None  # what ends the string or comment that we are in
        self._is_long = False
        self._is_string = False
        self._is_escaped = False
        self._tail = ""  # the last characters outside of strings and comments
        self._inside = ""  # the last characters inside
        self._num_opened = 0
        self.open: list[_Open] = []
        self.line = 0
        self.indent = 0
        self.is_line_blank = True
        self.last_code = ""
        """The last code character of the line that is not a space; "" if there is none."""

    @property
    def is_in_text(self) -> bool:
        """Whether the next line belongs to a string or a comment."""
        return self._ends_at is not None and self._is_long

    def copy(self) -> _Lexer:
        """One that goes on from here by itself."""
        other = copy.copy(self)
        other.open = list(self.open)
        return other

    def read(self, text: str) -> None:
        """Read what `feed` would, several characters at a time where they are plain."""
        for match in _RUN.finditer(text):
            run = match.group()
            if len(run) == 1 or self._is_escaped:
                for char in run:
                    self.feed(char)
                continue
            if self.is_line_blank:
                if run[0] == " ":
                    self.indent += len(run)
                else:
                    self.is_line_blank = False
            if self._ends_at is not None:
                self._inside = (self._inside + run)[-4:]
                continue
            self._tail = (self._tail + run)[-4:]
            if run[0] != " ":
                self.last_code = run[-1]

    def feed(self, char: str) -> _Open | str | None:
        """Read one character; the bracket that it closes, "" if that was not open, or None."""
        if char == "\n":
            self._end_line()
            return None
        if self.is_line_blank:
            if char == "\t":
                self.indent += TAB_WIDTH - self.indent % TAB_WIDTH
            elif char.isspace():
                self.indent += char not in "\r\f"
            else:
                self.is_line_blank = False
        if self._ends_at is not None:
            self._feed_inside(char)
            return None
        self._tail = (self._tail + char)[-4:]
        if self._begins_text(char):
            return None
        if not char.isspace():
            self.last_code = char
        is_literal = self._tail[-2:-1] == "'" and "'" not in self._style.quotes
        # But `'a')` and `'\n')`: that quote ended a literal.
        is_literal = is_literal and self._tail[-4:-3] not in ("'", "\\")
        if char in _OPENERS and not is_literal:
            self.open.append(_Open(_OPENERS[char], self.indent, self.line, self._num_opened))
            self._num_opened += 1
        elif char in _CLOSERS and not is_literal:
            # A closer of another kind: whoever wrote it, the innermost of its kind is over.
            for at in range(len(self.open) - 1, -1, -1):
                if self.open[at].closer == char:
                    closed = self.open[at]
                    del self.open[at:]
                    return closed
            return ""
        return None

    def _begins_text(self, char: str) -> bool:
        style, tail = self._style, self._tail
        for quote in style.long_quotes:
            if tail.endswith(quote):
                self._enter(quote, is_long=True, is_string=True)
                return True
        for begin, end in style.block_comments:
            if tail.endswith(begin):
                self._enter(end, is_long=True, is_string=False)
                return True
        for mark in style.line_comments:
            before = tail[: -len(mark)][-1:]
            # `$#`, `a#b` and `http://` are no comments.
            is_other = before in tuple("$:\\&") or (mark == "#" and before.isalnum())
            if tail.endswith(mark) and not is_other:
                self._enter("\n", is_long=False, is_string=False)
                return True
        # An apostrophe follows a word; letters before a string are few (`rb'`).
        is_apostrophe = char == "'" and len(tail) == 4 and tail[:3].isalnum()
        if char in style.quotes and not is_apostrophe:
            is_char = tail[-2:-1] == "'" and "'" not in style.quotes
            if not is_char:
                self._enter(char, is_long=False, is_string=True)
                return True
        return False

    def _enter(self, end: str, *, is_long: bool, is_string: bool) -> None:
        self._ends_at, self._is_long, self._is_string = end, is_long, is_string
        self._inside, self._is_escaped = "", False
        if is_string:
            self.last_code = end[-1]

    def _feed_inside(self, char: str) -> None:
        end = self._ends_at
        assert end is not None
        if self._is_escaped:
            self._is_escaped = False
            self._inside = ""
            return
        if char == "\\" and self._is_string:
            self._is_escaped = True
            return
        self._inside = (self._inside + char)[-4:]
        if self._inside.endswith(end):
            # `""` was an empty string, but a third quote makes it a long one.
            was_empty = len(end) == 1 and self._is_string and self._inside == end
            self._ends_at = None
            self._tail = end * 2 if was_empty else ""

    def _end_line(self) -> None:
        if self._ends_at is not None and not self._is_long:
            self._ends_at = None
        self._is_escaped = False
        if self._ends_at is not None:
            self._inside = ""
        self._tail = ""
        self.line += 1
        self.indent = 0
        self.is_line_blank = True
        self.last_code = ""


class LexerMemo:
    """Lexers that have read the code before a cursor: the next keystroke's code goes on from it.

    Safe to use from several threads.
    """

    MAX_LEXERS = 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: deque[tuple[Style, str, _Lexer]] = deque(maxlen=self.MAX_LEXERS)

    def lexer(self, style: Style, code: str) -> _Lexer:
        """A lexer that has read `code`; the caller's own."""
        lines = code[: code.rfind("\n") + 1]
        with self._lock:
            known = tuple(self._known)
        best = ""
        lexer = _Lexer(style)
        for other, text, that in known:
            if other == style and len(text) > len(best) and lines.startswith(text):
                best, lexer = text, that.copy()
        lexer.read(lines[len(best) :])
        if len(lines) > len(best):
            with self._lock:
                self._known.append((style, lines, lexer.copy()))
        lexer.read(code[len(lines) :])
        return lexer


class ScopeGuard:
    """Ends an answer where its scope is over; what it has released it never takes back.

    A line's end is held back, with the blank lines and the indentation after it, until the line
    that follows shows its first character; a line that repeats what stands after the cursor, until
    it differs. Except with "none", a bracket that is closed after the cursor is not closed twice.
    """

    def __init__(
        self,
        scope: StopScope,
        fim_prefix: str,
        fim_suffix: str,
        path: str | None = None,
        memo: LexerMemo | None = None,
    ) -> None:
        """Read the code around the cursor; `path` only tells the language. A `memo` that is kept
        from one guard to the next saves reading most of it again."""
        self._scope = scope
        self._stopped_by: Ending | None = None
        self._held = ""
        if scope == "none":
            return
        self._ending: Ending = scope
        self._style = style_of(path, fim_prefix[-MAX_LOOK_CHARS:] + fim_suffix[:1024])
        # In steps, so that typing rarely moves the start.
        look_start = max(0, len(fim_prefix) - MAX_LOOK_CHARS) // LOOK_STEP_CHARS * LOOK_STEP_CHARS
        if look_start:
            look_start = fim_prefix.find("\n", look_start) + 1
        memo = memo or LexerMemo()
        lexer = self._lexer = memo.lexer(self._style, fim_prefix[look_start:])
        fim_suffix = fim_suffix[:MAX_LOOK_CHARS]
        self._closed_later = _closed_by(lexer, self._style, fim_suffix)
        self._first_line = lexer.line
        self._num_open = len(lexer.open)
        self._num_open_before_line = sum(each.line < lexer.line for each in lexer.open)
        self._num_unknown_closed = 0
        self._has_closed = False
        head = fim_prefix[fim_prefix.rfind("\n") + 1 :]
        self._has_head = bool(head.strip())
        self._head_opens = self._has_head and lexer.last_code == ":"
        self._line_opens = self._head_opens
        self._line_opens_brackets = False
        self._base = lexer.indent if head else None
        rest, _, after = fim_suffix.partition("\n")
        self._rest = rest.strip()
        # A rest that begins with a bracket is the brackets' to judge.
        self._may_be_rest = bool(self._rest) and self._rest[0] not in _CLOSERS
        self._repeat = _next_line(after)
        self._line_text = "" if self._has_head else head
        self._has_text = False
        self._gap_at = -1  # where in _held the gap before this line begins; -1 if it is released
        self._is_gap_blank = False

    @property
    def stopped_by(self) -> Ending | None:
        """What ended the answer: "line", "block", "scope", "suffix", or None."""
        return self._stopped_by

    def feed(self, text: str) -> str:
        """Add text; return what is certain to be shown. After the end: always ""."""
        if self._stopped_by is not None:
            return ""
        if self._scope == "none":
            return text
        released = ""
        for char in text:
            released += self._end_line() if char == "\n" else self._add(char)
            if self._has_ended():
                break
        return released

    def flush(self) -> str:
        """Text still held back, once it is known that nothing more comes."""
        if self._stopped_by is not None or self._scope == "none":
            return ""
        cut = self._repeat_at()
        if cut is not None:
            return self._stop("suffix", cut)
        released, self._held = self._held, ""
        return released

    def _has_ended(self) -> bool:
        return self._stopped_by is not None

    @property
    def _depth(self) -> int:
        return len(self._lexer.open) - self._num_unknown_closed

    @property
    def _is_first_line(self) -> bool:
        return self._lexer.line == self._first_line

    def _add(self, char: str) -> str:
        """One character other than a line end."""
        lexer = self._lexer
        begins_line = lexer.is_line_blank and not char.isspace()
        was_in_text, depth = lexer.is_in_text, self._depth
        closed = lexer.feed(char)
        self._held += char
        self._line_text += char
        if lexer.is_line_blank or char == "\r":
            # Indentation after a line end, and half a line end, are settled by what follows.
            return self._release() if self._gap_at < 0 and char != "\r" else ""
        if closed is not None:
            if isinstance(closed, _Open) and closed in self._closed_later:
                before = self._held[:-1]
                return self._stop("suffix", len(before) if before.strip() else self._gap_at)
            self._note_closed(closed)
        if begins_line:
            if self._base is None or (self._is_first_line and not self._has_head):
                self._base = lexer.indent
            if self._gap_at >= 0 and not was_in_text and self._is_over(char, depth):
                return self._stop(self._ending, self._gap_at)
            self._has_text = True
        self._has_text = self._has_text or not char.isspace()
        return self._release()

    def _note_closed(self, closed: _Open | str) -> None:
        if not isinstance(closed, _Open):
            self._num_unknown_closed += 1
            self._has_closed = True
        elif self._depth < self._num_open:
            # `foo(|` is finished by `a)` and goes on; `foo(|` and lines of arguments are a scope.
            self._has_closed = self._has_closed or (
                closed.line < self._first_line or not self._is_first_line
            )

    def _end_line(self) -> str:
        lexer = self._lexer
        cut = self._repeat_at()
        if cut is not None:
            return self._stop("suffix", cut)
        line_end = len(self._held) - self._held.endswith("\r")
        if self._scope == "line":
            if self._has_text or (self._is_first_line and self._rest):
                return self._stop("line", line_end)
        elif not lexer.is_in_text:
            if self._is_first_line and self._has_head:
                self._line_opens = lexer.last_code == ":"
                self._line_opens_brackets = self._depth > self._num_open_before_line
            is_closed = self._has_closed and self._depth < self._num_open
            if self._scope == "block" and self._line_opens_brackets:
                is_closed = is_closed or self._depth <= self._num_open_before_line
            if is_closed:
                return self._stop(self._ending, line_end)
        is_blank = lexer.is_line_blank
        lexer.feed("\n")
        self._line_text = ""
        if is_blank and self._gap_at >= 0:
            self._held += "\n"
            self._is_gap_blank = True
            return ""
        released, self._held = self._held[:line_end], self._held[line_end:] + "\n"
        self._gap_at, self._is_gap_blank = 0, is_blank
        return released

    def _is_over(self, char: str, depth: int) -> bool:
        """Whether the line that begins with `char` is beyond the scope.

        `depth` is the number of brackets open before it.
        """
        if self._scope == "line" or char in _CLOSERS or depth > self._num_open:
            return False
        if char == "#" and self._style.has_directives:
            return False
        indent, base = self._lexer.indent, self._base
        assert base is not None, "the first line with text sets it"
        opens = self._line_opens if self._scope == "block" else self._head_opens
        if indent < base or (opens and indent == base):
            return True
        has_begun = self._has_head or self._has_text
        return self._scope == "block" and self._is_gap_blank and has_begun and indent <= base

    def _release(self) -> str:
        """What is held, unless it may still turn out to repeat what follows the cursor."""
        if (
            self._repeat is not None
            and self._is_whole_line
            and self._repeat.startswith(self._line_text.rstrip())
            and (self._line_text.strip() or self._repeat.startswith(self._line_text))
        ):
            return ""
        cut = len(self._held) - self._num_maybe_rest()
        released, self._held = self._held[:cut], self._held[cut:]
        self._gap_at = -1
        return released

    @property
    def _is_whole_line(self) -> bool:
        """Whether the current line, held back from its start, is all the answer's."""
        return self._gap_at >= 0 or (self._is_first_line and not self._has_head)

    def _repeat_at(self) -> int | None:
        """Where in the held text the code after the cursor begins to be repeated, if it is."""
        text = self._held.rstrip()
        if self._is_whole_line and self._line_text.rstrip() == self._repeat:
            return max(self._gap_at, 0)
        if self._may_be_rest and self._is_first_line and text.endswith(self._rest):
            return len(text) - len(self._rest)
        return None

    def _num_maybe_rest(self) -> int:
        """Length of the held text's end that may be the rest of the cursor's line."""
        if not self._may_be_rest or not self._is_first_line:
            return 0
        held, rest = self._held, self._rest
        sizes = [n for n in range(1, min(len(held), len(rest)) + 1) if held.endswith(rest[:n])]
        text = held.rstrip()
        if text.endswith(rest):
            sizes.append(len(held) - len(text) + len(rest))
        return max(sizes, default=0)

    def _stop(self, reason: Ending, cut: int) -> str:
        released, self._held = self._held[: max(cut, 0)], ""
        self._stopped_by = reason
        return released


def _closed_by(lexer: _Lexer, style: Style, fim_suffix: str) -> frozenset[_Open]:
    """Which brackets that are open at the cursor the code after it closes.

    A closer that begins a line is its opener's if it is indented as little: in unfinished code the
    next closer often belongs to an outer bracket.
    """
    later = _Lexer(style)
    later.line, later.indent = lexer.line, lexer.indent
    later.is_line_blank = lexer.is_line_blank
    still_open = list(lexer.open)
    closed: set[_Open] = set()
    for char in fim_suffix:
        if not still_open:
            break
        was_blank = later.is_line_blank
        if later.feed(char) != "":
            continue
        if was_blank:
            while still_open and still_open[-1].indent > later.indent:
                still_open.pop()
        if still_open and still_open[-1].closer == char:
            closed.add(still_open.pop())
    return frozenset(closed)


def _next_line(text: str) -> str | None:
    """The first line of the text that is not blank, its indentation included."""
    for line in text.split("\n"):
        if line.strip():
            is_telling = sum(char.isalnum() for char in line) >= MIN_REPEAT_WORD_CHARS
            return line.rstrip() if is_telling else None
    return None
