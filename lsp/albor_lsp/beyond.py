"""What an answer without a gate says about the places that typing may reach next.

A suggestion ends before its first token that is less likely than the gate asks. Behind it stands
more: once the person has typed that token, or as much of it as rules the others out, what follows
is what the engine would answer there. Asked for while the person reads, it costs nothing at the
next key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

__all__ = ["places_beyond", "turns"]

LEFT_OVER_SHARE: Final = 0.25
"""Of the likelihood that no listed token has, what may belong to tokens that begin as typed."""
LEAST_CHANCE: Final = 0.01
"""Turns that are less likely are not worth computing."""

Token = tuple[str, float]
"""(text, log-probability)."""


def places_beyond(
    tokens: Sequence[Token],
    alternatives: Sequence[Mapping[str, float]],
    min_confidence: float,
    *,
    is_whole: bool,
) -> Iterator[tuple[str, str]]:
    """Yields (typed, rest): where `typed` follows the prompt, `rest` is to be suggested.

    Args:
        tokens: an answer that no gate ended.
        alternatives: for each token, the likeliest ones with their log-probabilities; may be
            shorter.
        min_confidence: 0 to 1, the gate.
        is_whole: False where the answer was cut: what its last sure tokens lead to is not known.

    The first pair's `typed` is empty. A place whose `rest` is empty says that nothing is to be
    suggested there.
    """
    size = len(tokens)
    unsure = [at for at, (_, logprob) in enumerate(tokens) if math.exp(logprob) < min_confidence]
    starts = [0, *(at + 1 for at in unsure)]
    ends = [*unsure, size]
    texts = [text for text, _ in tokens]
    for start, end in zip(starts, ends, strict=True):
        if end == size and not is_whole:
            break
        rest = "".join(texts[start:end])
        if start:
            token = start - 1
            typed_len = _sure_after(tokens[token], alternatives[token:start], min_confidence)
            if typed_len:
                text = texts[token]
                yield "".join(texts[:token]) + text[:typed_len], text[typed_len:] + rest
        if start < size or not start:
            yield "".join(texts[:start]), rest


def _sure_after(
    token: Token, alternatives: Sequence[Mapping[str, float]], min_confidence: float
) -> int:
    """How many characters of a token make the rest of it likely enough; 0 where none do."""
    text, logprob = token
    if not alternatives:
        return 0
    others = {other: math.exp(value) for other, value in alternatives[0].items() if other != text}
    own = math.exp(logprob)
    left_over = max(0.0, 1.0 - own - sum(others.values())) * LEFT_OVER_SHARE
    for size in range(1, len(text)):
        typed = text[:size]
        if not typed.strip():
            continue
        rivals = sum(value for other, value in others.items() if other.startswith(typed))
        if own >= min_confidence * (own + rivals + left_over):
            return size
    return 0


def turns(
    tokens: Sequence[Token],
    alternatives: Sequence[Mapping[str, float]],
    prompt: str,
    num: int,
) -> list[str]:
    """The likeliest `num` texts that leave an answer with their last character.

    Args:
        tokens, alternatives: see `places_beyond`.
        prompt: what the answer goes on from. Where it ends inside of a token, the alternatives of
            the first token begin with a part of it.
    """
    chances: dict[str, float] = {}
    reached, before = 1.0, ""
    for at, ((text, logprob), others) in enumerate(zip(tokens, alternatives, strict=False)):
        known = {other: value for other, value in others.items() if other != text}
        for other, value in known.items() if at else _after_prompt(known, prompt):
            shared = _shared_len(other, text)
            if shared < min(len(other), len(text)):
                turn = before + other[: shared + 1]
                chances[turn] = chances.get(turn, 0.0) + reached * math.exp(value)
        reached *= math.exp(logprob)
        before += text
    likely = (turn for turn, chance in chances.items() if chance >= LEAST_CHANCE)
    return sorted(likely, key=lambda turn: -chances[turn])[:num]


def _after_prompt(others: Mapping[str, float], prompt: str) -> Iterator[tuple[str, float]]:
    words = list(others)
    shared_len = min((_shared_len(words[0], word) for word in words), default=0)
    fitting = (size for size in range(shared_len, 0, -1) if prompt.endswith(words[0][:size]))
    size = next(fitting, 0)
    for other, value in others.items():
        if other[size:]:
            yield other[size:], value


def _shared_len(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
