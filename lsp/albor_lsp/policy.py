"""When to ask for a suggestion, and how much of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["Debounce", "Decision", "StopScope", "should_ask"]

StopScope = Literal["line", "block", "scope", "none"]

LINE_TOKENS: Final = 32
BLOCK_TOKENS: Final = 96
_CLOSERS: Final = frozenset(")]}>\"'`,;: \t")
_COMMENT: Final = re.compile(r"^\s*(?:#|//|--|;|\*|/\*|<!--)")


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to ask, why, and where the answer is to end."""

    ask: bool
    reason: str
    stop_scope: StopScope = "line"
    max_tokens: int = LINE_TOKENS


def should_ask(before: str, after: str, language: str, *, invoked: bool) -> Decision:  # noqa: ARG001
    """Decide from the text around the cursor.

    Args:
        before: the text before the cursor, at least its line.
        after: the text after it, at least the rest of its line.
        language: LSP's language id.
        invoked: the person asked: the answer is always yes.
    """
    line = before[_last_break(before) :]
    rest = re.split(r"[\r\n]", after, maxsplit=1)[0]
    is_mid_line = not set(rest) <= _CLOSERS
    inside_word = bool(line) and _is_word(line[-1]) and bool(rest) and _is_word(rest[0])
    if not invoked:
        if inside_word:
            return Decision(False, "inside a word")
        if not before.strip() and not after.strip():
            return Decision(False, "an empty file")
    if is_mid_line:
        return Decision(True, "code follows in the line", "line", LINE_TOKENS)
    if _COMMENT.match(line):
        return Decision(True, "a comment", "line", LINE_TOKENS)
    if rest.strip():
        return Decision(True, "brackets follow in the line", "line", LINE_TOKENS)
    if invoked or not line.strip() or line.rstrip().endswith((":", "{", "(", "[", "=>", "->")):
        return Decision(True, "a new line", "block", BLOCK_TOKENS)
    return Decision(True, "a line to finish", "line", LINE_TOKENS)


def _last_break(text: str) -> int:
    return max(text.rfind("\n"), text.rfind("\r")) + 1


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


class Debounce:
    """How long to wait for another key before asking, from how fast answers have been.

    Where an answer takes less time than a fast typist's next key there is no wait at all.
    """

    FREE_MS: Final = 150.0
    MAX_MS: Final = 400.0
    WEIGHT: Final = 0.2

    def __init__(self) -> None:
        self._latency_ms = 0.0

    def observe(self, latency_ms: float, *, busy: bool = False) -> None:
        """Note how long an answer took; `busy`: other requests stood before it."""
        weight = self.WEIGHT / 2 if busy else self.WEIGHT
        self._latency_ms += weight * (latency_ms - self._latency_ms)

    def delay_ms(self) -> float:
        """Milliseconds to wait; 0 where answers are fast."""
        return min(max(0.0, (self._latency_ms - self.FREE_MS) / 2), self.MAX_MS)
