"""Tokenize a text that was tokenized a keystroke ago, all but the lines that changed.

Byte-level tokenizers first split a text by a pattern and merge bytes only inside the pieces. Where
the pattern always ends a piece, a text can be cut and its parts be tokenized alone, or looked up.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from albor_serve.tokenizer import Tokenizer

__all__ = ["LineMemoTokenizer", "can_be_cut_at_lines"]

MIN_PART_CHARS: Final = 256
MAX_MEMO_CHARS: Final = 1 << 21
MIN_CHARS: Final = 2 * MIN_PART_CHARS
"""Shorter texts are tokenized as they are."""

_PATTERNS: Final = frozenset(("qwen2", "qwen35", "llama-bpe", "llama3", "smaug-bpe", "dbrx"))
"""Names (GGUF's tokenizer.ggml.pre) of patterns whose pieces never go on from a line end to a line
that begins, after spaces and tabs, with a visible character: each alternative that takes line ends
takes all that follow one another, and then stops."""

_LINE_START: Final = re.compile(r"(?<=\n)(?=[ \t]*[!-~])")


def can_be_cut_at_lines(pattern: str) -> bool:
    """Whether texts of a tokenizer with this pattern may be tokenized in parts."""
    return pattern in _PATTERNS


class LineMemoTokenizer:
    """A tokenizer in front of another one, whose pattern `can_be_cut_at_lines`.

    Gives exactly the same tokens. Keeps those of the parts used last, a few megabytes of text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._memo: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._num_chars = 0

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer`."""
        return self._tokenizer.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """See `Tokenizer`."""
        return self._tokenizer.bos_token_id

    @property
    def adds_bos(self) -> bool:
        """See `Tokenizer`."""
        return self._tokenizer.adds_bos

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `Tokenizer`."""
        return self._tokenizer.eos_token_ids

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`; raises what it raises."""
        # A control token's spelling could begin in one part and end in the next.
        if parse_special or len(text) < MIN_CHARS:
            return self._tokenizer.encode(text, parse_special=parse_special)
        ids: list[int] = []
        for part in _parts(text):
            ids += self._encode_part(part)
        return ids

    def _encode_part(self, part: str) -> tuple[int, ...]:
        with self._lock:
            known = self._memo.get(part)
            if known is not None:
                self._memo.move_to_end(part)
                return known
        ids = tuple(self._tokenizer.encode(part))
        with self._lock:
            if part not in self._memo:
                self._memo[part] = ids
                self._num_chars += len(part)
            while self._num_chars > MAX_MEMO_CHARS:
                old, _ = self._memo.popitem(last=False)
                self._num_chars -= len(old)
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        """See `Tokenizer.decode`."""
        return self._tokenizer.decode(ids)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        return self._tokenizer.token_bytes(token_id)

    def special_id(self, spelling: str) -> int | None:
        """See `Tokenizer.special_id`."""
        return self._tokenizer.special_id(spelling)


def _parts(text: str) -> list[str]:
    """The text in parts of some hundred characters, each of whole lines."""
    cuts = [0]
    for match in _LINE_START.finditer(text):
        if match.start() - cuts[-1] >= MIN_PART_CHARS:
            cuts.append(match.start())
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
