"""Token healing: let the answer begin with bytes that the person has already typed.

A prompt that ends inside a word or after indentation ends at a token boundary that training
never showed. So the prompt leaves its last bytes out (fim.py decides how many), and here the
first sampled tokens are limited to those that agree with these bytes. The idea is known as token
healing (Lundberg, "The Art of Prompt Design", 2023).
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

from albor_serve.tokenizer import Tokenizer

__all__ = ["ForcedBytes", "TokenIndex"]

TokenIds = npt.NDArray[np.int64]


class TokenIndex:
    """The vocabulary sorted by bytes, for finding the tokens that agree with given bytes.

    Control tokens stand for no bytes and are left out. Building it takes about 0.2 s for 150,000
    tokens; it is immutable afterwards.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        pairs = sorted(
            (piece, token_id)
            for token_id in range(tokenizer.vocab_size)
            if (piece := tokenizer.token_bytes(token_id))
        )
        self._pieces = [piece for piece, _ in pairs]
        self._ids = np.array([token_id for _, token_id in pairs], dtype=np.int64)

    def compatible(self, wanted: bytes) -> TokenIds:
        """Ids of the tokens that start with `wanted` or that `wanted` starts with (not empty)."""
        spans = [self._exact(wanted[:size]) for size in range(1, len(wanted))]
        spans.append(self._starting_with(wanted))
        return np.concatenate([self._ids[low:high] for low, high in spans])

    def _exact(self, piece: bytes) -> tuple[int, int]:
        low = bisect_left(self._pieces, piece)
        return low, bisect_left(self._pieces, piece + b"\0", low)

    def _starting_with(self, start: bytes) -> tuple[int, int]:
        low = bisect_left(self._pieces, start)
        # The smallest byte string above everything that begins with `start`.
        above = start.rstrip(b"\xff")
        if not above:
            return low, len(self._pieces)
        return low, bisect_left(self._pieces, above[:-1] + bytes([above[-1] + 1]), low)


class ForcedBytes:
    """Bytes that an answer must begin with, and how many of them it has produced."""

    def __init__(self, index: TokenIndex, wanted: bytes) -> None:
        self._index = index
        self._remaining = wanted

    @property
    def is_done(self) -> bool:
        """Whether every forced byte has been produced."""
        return not self._remaining

    @property
    def num_remaining(self) -> int:
        """Forced bytes that have not been produced yet."""
        return len(self._remaining)

    def allowed(self) -> TokenIds | None:
        """Ids that may come next; None for no limit. Empty if the vocabulary cannot spell it."""
        return self._index.compatible(self._remaining) if self._remaining else None

    def advance(self, piece: bytes) -> bytes:
        """Take the bytes of the next token; return those that go beyond the forced ones."""
        covered = min(len(piece), len(self._remaining))
        self._remaining = self._remaining[covered:]
        return piece[covered:]
