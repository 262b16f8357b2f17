"""How a person types: keystrokes, and the time before each."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["FAST", "NORMAL", "Typist", "keystrokes"]


@dataclass(frozen=True, slots=True)
class Typist:
    """Log-normal times between keys, longer before words and lines.

    The medians are in the range that Dhakal et al., "Observations on Typing from 136 Million
    Keystrokes" (CHI 2018) report: about 240 ms between keys for an average person, 120 ms for a
    fast one. Log-normal tails are usual in that literature; the pauses at lines are our own
    choice, for writing code needs thought.
    """

    name: str
    key_ms: float
    """Median between two keys of a word."""
    sigma: float
    """Of the logarithm, for keys."""
    word_factor: float
    """Median before a word's first key, over `key_ms`."""
    line_ms: float
    """Median before a line's first key."""
    line_sigma: float
    max_ms: float
    """No pause is longer: waiting measures nothing."""

    def delays(self, keys: Sequence[str], rng: random.Random) -> list[float]:
        """Seconds before each key."""
        delays = []
        for at, key in enumerate(keys):
            last = keys[at - 1] if at else "\n"
            if last.startswith("\n"):
                median, sigma = self.line_ms, self.line_sigma
            elif _is_word(key) and not _is_word(last):
                median, sigma = self.key_ms * self.word_factor, self.sigma
            else:
                median, sigma = self.key_ms, self.sigma
            ms = median * math.exp(rng.gauss(0.0, sigma))
            delays.append(min(ms, self.max_ms) / 1000)
        return delays


NORMAL: Final = Typist("normal", 190.0, 0.40, 1.5, 700.0, 0.5, 3000.0)
FAST: Final = Typist("fast", 95.0, 0.30, 1.25, 300.0, 0.4, 1500.0)


def keystrokes(text: str) -> list[str]:
    """What each key adds: a character, or a line end with the indentation that follows it.

    Editors indent new lines themselves; that they sometimes do it wrong is left out.
    """
    return re.findall(r"\n[ \t]*|[^\n]", text)


def _is_word(key: str) -> bool:
    return key.isalnum() or key == "_"
