"""When to ask for a suggestion, how much of one, and after what delay."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["DEFAULT_MIN_CONFIDENCE", "Debounce", "Decision", "should_ask"]

DEFAULT_MIN_CONFIDENCE: Final = 0.0
"""The gate is open: a threshold has to be measured before it may hide anything."""
MAX_LOOK_CHARS: Final = 4096
"""How much code before the cursor is read for strings and comments."""
LINE_LEN: Final = 48
PROSE_LEN: Final = 24
BLOCK_LEN: Final = 96
SCOPE_LEN: Final = 160

StopScope = Literal["line", "block", "scope", "none"]
_Place = Literal["code", "comment", "string"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to ask, why, and for how much."""

    ask: bool
    reason: str
    stop_scope: StopScope
    max_tokens: int


_C_LIKE: Final = frozenset(
    [
        "c",
        "cpp",
        "csharp",
        "css",
        "dart",
        "go",
        "java",
        "javascript",
        "javascriptreact",
        "kotlin",
        "objective-c",
        "php",
        "rust",
        "scala",
        "scss",
        "swift",
        "typescript",
        "typescriptreact",
        "zig",
    ]
)
_SEMICOLONS: Final = frozenset(
    ["c", "cpp", "csharp", "css", "dart", "java", "php", "rust", "scss", "zig"]
)
_SEMICOLONS_TOO: Final = frozenset(
    ["javascript", "javascriptreact", "typescript", "typescriptreact", "objective-c"]
)
_PROSE: Final = frozenset(["markdown", "plaintext", "latex", "restructuredtext"])
_MARKUP: Final = frozenset(["html", "xml", "vue", "svelte"])

_STRING: Final = r"\"(?:\\.|[^\"\\\n])*(?P<dq>\"|\n|\Z)|'(?:\\.|[^'\\\n])*(?P<sq>'|\n|\Z)"
_HASH_SCAN: Final = re.compile(
    r"(?P<comment>\#[^\n]*)|(?P<long>\"\"\"|''')|" + _STRING, re.DOTALL | re.VERBOSE
)
_C_SCAN: Final = re.compile(
    r"(?P<comment>//[^\n]*|/\*.*?(?:\*/|\Z))|(?P<long>`)|" + _STRING, re.DOTALL
)
# A quote in Rust may begin a lifetime, so only a whole character literal is a string there.
_RUST_SCAN: Final = re.compile(
    r"(?P<comment>//[^\n]*|/\*.*?(?:\*/|\Z))|(?P<long>\0)|\"(?:\\.|[^\"\\])*(?P<dq>\"|\Z)"
    r"|'(?:\\.|[^'\\\n])(?P<sq>')",
    re.DOTALL,
)
_OPENS_BODY: Final = re.compile(
    r"^\s*(?:async\s+)?(?:def|class)\b|\b(?:func|fn|function)\b|=>\s*\{$"
)
_FINISHED: Final = re.compile(r"^\s*(?:pass|break|continue)$")


def _place(before: str, language: str) -> _Place:
    """Where the cursor stands, by a scan of the nearest 4096 characters."""
    if language in _PROSE:
        return "code"
    start = max(0, len(before) - MAX_LOOK_CHARS)
    if start:
        start = before.find("\n", start) + 1 or start
    if language in _MARKUP:
        opened = before.rfind("<!--", start)
        return "comment" if opened > before.rfind("-->", start) else "code"
    scan = _RUST_SCAN if language == "rust" else _C_SCAN if language in _C_LIKE else _HASH_SCAN
    at = start
    # A long string that began before the part that is read: an odd number of its quotes.
    if start and language == "python" and before.count('"""', 0, start) % 2:
        at = before.find('"""', start)
        if at < 0:
            return "string"
        at += 3
    while match := scan.search(before, at):
        at = match.end()
        if match["comment"] is not None:
            is_closed = match["comment"].startswith("/*") and match["comment"].endswith("*/")
            if at == len(before) and not is_closed:
                return "comment"
        elif match["long"] is not None:
            closed = before.find(match["long"], at)
            if closed < 0:
                return "string"
            at = closed + len(match["long"])
        elif at == len(before) and (match["dq"] if match["dq"] is not None else match["sq"]) == "":
            return "string"
    return "code"


def _no(reason: str) -> Decision:
    return Decision(False, reason, "none", 0)


def should_ask(before: str, after: str, language: str, invoked: bool) -> Decision:
    """Decides by the text around the cursor; `language` is the protocol's language id.

    A request that a person made by hand (`invoked`) is always asked.
    """
    line = before[before.rfind("\n") + 1 :]
    rest = after.partition("\n")[0].strip()
    if not invoked:
        if not before.strip() and not after.strip():
            return _no("the document is empty")
        if after[:1].isalnum() or after[:1] == "_":
            return _no("the cursor stands inside a word")
    place = _place(before, language)
    if place != "code" or language in _PROSE:
        reason = "prose" if language in _PROSE else place
        return Decision(True, reason, "line", LINE_LEN if place == "string" else PROSE_LEN)
    stripped = line.strip()
    if not invoked and not rest and stripped:
        ends = language in _SEMICOLONS or language in _SEMICOLONS_TOO
        if ends and stripped.endswith(";"):
            return _no("the statement is finished")
        if language == "python" and _FINISHED.match(line.rstrip()):
            return _no("the statement is finished")
    if rest.strip(")]};,:\"'`> "):
        return Decision(True, "code follows on the line", "line", LINE_LEN)
    opener = (":", "(", "[", "{") if language == "python" else ("{", "(", "[")
    if stripped:
        if stripped.endswith(opener if language == "python" else "{") and not rest:
            return Decision(True, "a new block", "block", BLOCK_LEN)
        return Decision(True, "the end of a line", "line", LINE_LEN)
    above = before.rstrip()
    last_line = above[above.rfind("\n") + 1 :]
    if last_line.endswith(opener):
        if _OPENS_BODY.search(last_line) and not _body_follows(last_line, after):
            return Decision(True, "a new body", "scope", SCOPE_LEN)
        return Decision(True, "a new block", "block", BLOCK_LEN)
    return Decision(True, "a new line", "block", BLOCK_LEN)


def _body_follows(opener: str, after: str) -> bool:
    """Whether a line indented deeper than `opener` comes next."""
    depth = len(opener) - len(opener.lstrip())
    below = next((each for each in after[:1024].split("\n")[1:] if each.strip()), "")
    return len(below) - len(below.lstrip()) > depth


class Debounce:
    """How long to wait after a keystroke: not at all while the engine is idle and fast."""

    FAST_MS: Final = 150.0
    MAX_MS: Final = 300.0
    _WEIGHT: Final = 0.3

    def __init__(self) -> None:
        self._latency_ms = 0.0
        self._busy = False

    def observe(self, latency_ms: float, busy: bool) -> None:
        """Takes in the latency of an answer and whether others are still being computed."""
        latency_ms = max(0.0, latency_ms)
        if self._latency_ms:
            self._latency_ms += self._WEIGHT * (latency_ms - self._latency_ms)
        else:
            self._latency_ms = latency_ms
        self._busy = busy

    def delay_ms(self) -> float:
        """Milliseconds to wait before the next automatic request, 0 to 300."""
        if self._latency_ms <= self.FAST_MS and not self._busy:
            return 0.0
        return min(self.MAX_MS, self._latency_ms / 2)
