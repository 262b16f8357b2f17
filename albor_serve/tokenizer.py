"""Text to token ids and back.

`Tokenizer` is what the rest of albor asks for. `JsonTokenizer` reads Hugging Face's
`tokenizer.json`; the llama.cpp backend brings its own for GGUF files (backends/llamacpp.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

__all__ = ["Tokenizer", "well_formed"]


def well_formed(text: str) -> str:
    """`text` with each lone surrogate replaced by U+FFFD, so that it can be encoded as UTF-8.

    A high surrogate followed by a low one becomes the character that the pair stands for.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. Implementations are safe to call from several threads."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; valid ids are 0 to vocab_size - 1."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that models of this family expect first, if `adds_bos`."""

    @property
    def adds_bos(self) -> bool:
        """Whether a plain-text prompt must start with `bos_token_id`. `encode` never adds it."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends an answer (end of text, end of turn, FIM padding, ...)."""

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, exactly those of training: nothing added, nothing stripped.

        With `parse_special`, spellings such as <|fim_prefix|> become their control tokens;
        without it they are ordinary text, so that a person's code cannot inject them. Lone
        surrogates are encoded as U+FFFD.
        """

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of a token sequence, control tokens left out."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for in running text; b"" for control tokens.

        Raises RequestError for an id outside the vocabulary.
        """

    def special_id(self, spelling: str) -> int | None:
        """Id of the control token spelled exactly so, or None where the vocabulary has none."""
