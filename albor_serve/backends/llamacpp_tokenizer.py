"""The tokenizer inside a GGUF file, as llama.cpp reads it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from albor_serve.backends import llamacpp_native as native
from albor_serve.errors import AlborError, BackendError, RequestError
from albor_serve.tokenizer import JsonTokenizer, Tokenizer, well_formed

__all__ = ["LlamaCppTokenizer", "choose_tokenizer"]

_MAX_TEXT_BYTES = (1 << 31) - 64
_MAX_RUN_BYTES = 1000


def _byte_classes() -> npt.NDArray[np.uint8]:
    """For each byte: 0 white space, 1 ASCII punctuation, 2 all else."""
    classes = np.full(256, 2, dtype=np.uint8)
    classes[[*b" \t\n\v\f\r"]] = 0
    classes[[b for b in range(0x21, 0x7F) if not (chr(b).isalnum() or chr(b) == "_")]] = 1
    return classes


_CLASS_OF_BYTE = _byte_classes()


def split_long_runs(data: bytes) -> list[bytes]:
    """Cut UTF-8 text inside any run of one class of characters that is longer than 1,000 bytes.

    For some families (DeepSeek-Coder, Seed-Coder, Falcon) llama.cpp splits text with std::regex,
    which recurses once for each character that a pattern matches: 32,000 letters in a row end
    the process. No real token crosses such a cut but by chance.
    """
    if len(data) <= _MAX_RUN_BYTES:
        return [data]
    classes = _CLASS_OF_BYTE[np.frombuffer(data, dtype=np.uint8)]
    starts = np.concatenate(([0], np.flatnonzero(np.diff(classes)) + 1, [len(data)]))
    lengths = np.diff(starts)
    cuts = [0]
    for run in np.flatnonzero(lengths > _MAX_RUN_BYTES):
        begin, end = int(starts[run]), int(starts[run + 1])
        for cut in range(begin + _MAX_RUN_BYTES, end, _MAX_RUN_BYTES):
            while data[cut] & 0xC0 == 0x80:  # inside a character
                cut -= 1
            cuts.append(cut)
    return [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True)]


class LlamaCppTokenizer:
    """`Tokenizer` over the vocabulary of a model that llama.cpp has loaded.

    It borrows the vocabulary: the model's owner calls `close` before freeing the model, and any
    later call that needs the vocabulary raises BackendError. Safe to call from several threads.

    Vocabularies of the SentencePiece kind may put a space before the text, as their models were
    trained; all byte-level ones encode the text as it is.
    """

    def __init__(self, vocab: Any) -> None:
        """Wrap `vocab`, a llama_vocab pointer."""
        self._lib = native.load_library()
        self._vocab = vocab
        self._lock = threading.Lock()
        self._table: list[bytes] | None = None
        lib = self._lib
        self._vocab_size = int(lib.llama_vocab_n_tokens(vocab))
        self._is_byte_level = lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_BPE
        bos = int(lib.llama_vocab_bos(vocab))
        self._bos = bos if bos >= 0 else None
        self._adds_bos = bool(lib.llama_vocab_get_add_bos(vocab)) and bos >= 0
        self._eos = frozenset(
            i for i in range(self._vocab_size) if lib.llama_vocab_is_eog(vocab, i)
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, unused ones included."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """The token that models of this family expect first, if `adds_bos`."""
        return self._bos

    @property
    def adds_bos(self) -> bool:
        """Whether a plain-text prompt must start with `bos_token_id`."""
        return self._adds_bos

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """llama.cpp's end-of-generation set: end of text and of turn, FIM pad, repo, file."""
        return self._eos

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; see `Tokenizer.encode`.

        Raises:
            RequestError: more than 2 GiB of text. BackendError: the model is closed.
        """
        data = well_formed(text).encode("utf-8")
        if not data:
            return []
        if len(data) > _MAX_TEXT_BYTES:
            raise RequestError("the text is larger than 2 GiB: shorten it")
        # Only byte-level vocabularies are split by patterns; others may put a space before a text.
        pieces = split_long_runs(data) if self._is_byte_level else [data]
        if len(pieces) == 1:
            return self._encode_piece(data, parse_special)
        return [i for piece in pieces for i in self._encode_piece(piece, parse_special)]

    def _encode_piece(self, data: bytes, parse_special: bool) -> list[int]:
        # No vocabulary makes more tokens than bytes, a leading space aside; the loop is for one
        # that does.
        capacity = len(data) + 16
        while True:
            buffer = np.empty(capacity, dtype=np.int32)
            with self._lock:
                count = self._lib.llama_tokenize(
                    self._open_vocab(),
                    data,
                    len(data),
                    buffer.ctypes.data_as(self._lib.llama_token_p),
                    capacity,
                    False,
                    parse_special,
                )
            if count >= 0:
                tokens: list[int] = buffer[:count].tolist()
                return tokens
            if -count <= capacity:
                raise BackendError(
                    f"llama.cpp could not tokenize {len(data)} bytes of text (code {count}): "
                    f"shorten the text"
                )
            capacity = -count

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of a token sequence, control tokens left out.

        Raises:
            RequestError: an id is outside the vocabulary. BackendError: the model is closed.
        """
        return b"".join([self.token_bytes(i) for i in ids])

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for in running text; b"" for control tokens.

        The first call reads the whole vocabulary (about 1 µs a token).

        Raises:
            RequestError: the id is outside the vocabulary. BackendError: the model is closed.
        """
        table = self._table
        if table is None:
            table = self._read_table()
        if not 0 <= token_id < self._vocab_size:
            raise RequestError(
                f"token id {token_id} is outside the vocabulary: use 0 to {self._vocab_size - 1}"
            )
        return table[token_id]

    def special_id(self, spelling: str) -> int | None:
        """Id of the control token spelled exactly so, or None where the vocabulary has none."""
        ids = self.encode(spelling, parse_special=True)
        if len(ids) != 1:
            return None
        lib = self._lib
        with self._lock:
            vocab = self._open_vocab()
            attributes = lib.llama_vocab_get_attr(vocab, ids[0])
            text = lib.llama_vocab_get_text(vocab, ids[0])
        control = attributes & (lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED)
        return ids[0] if control and text == well_formed(spelling).encode() else None

    def close(self) -> None:
        """Stop using the vocabulary; waits for a call in flight. Closing twice is harmless."""
        with self._lock:
            self._vocab = None

    def _open_vocab(self) -> Any:
        if self._vocab is None:
            raise BackendError("the model is closed: load it again")
        return self._vocab

    def _read_table(self) -> list[bytes]:
        to_piece = self._lib.llama_token_to_piece
        size = 256
        buffer = ctypes.create_string_buffer(size)
        table: list[bytes] = []
        with self._lock:
            vocab = self._open_vocab()
            if self._table is not None:
                return self._table
            for token_id in range(self._vocab_size):
                count = to_piece(vocab, token_id, buffer, size, 0, False)
                if count < 0:  # the piece is longer than the buffer: -count bytes
                    size = -count
                    buffer = ctypes.create_string_buffer(size)
                    count = to_piece(vocab, token_id, buffer, size, 0, False)
                table.append(ctypes.string_at(buffer, count) if count > 0 else b"")
            self._table = table
        return table


_PROBES = (
    'def f(self, x: int = 10) -> str:\n    return f"{x!r:>{20}}"\n\n\n',
    '\tif (a&&b) {\r\n\t\tprintf("%d\\n", 0x1F, 1_000, 3.14e-10);\r\n\t}\r\n',
    " " * 7 + "x" + " " * 129 + "\n" + "\t" * 9 + "\n\n \n",
    "don't WE'LL I'd you've it's I'M\u2019s snake_case camelCase HTTPServer2",
    "caf\u00e9 cafe\u0301 \u4f60\u597d\u4e16\u754c \u0441\u043b\u043e \ufb01",
    "\u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00a0\u2003\u3000\ufeff\x00\x7f\x85",
    "12345 1234567890123 \u0663\u0664 \u00b2\u00bd \u2167 ++--==>>>=<<= //### ... ---",
    "<|fim_prefix|> <|endoftext|> </s> <s> [INST] <fim_suffix>",
)
"""Texts on which pre-tokenizers and normalizers are known to differ."""


def choose_tokenizer(gguf: LlamaCppTokenizer, tokenizer_json: Path) -> Tokenizer:
    """The tokenizer to use for a GGUF file that may have a tokenizer.json beside it.

    llama.cpp reimplements each family's pre-tokenizer and has no Unicode normalization, so its
    ids can differ from those of training. The rule:

    1. No tokenizer.json, an unreadable one, or one of another vocabulary (some token stands for
       other bytes): the GGUF file's own.
    2. Both give the same ids on a set of probing texts: the GGUF file's own; it needs nothing
       else in memory.
    3. They differ: tokenizer.json, which is what the model was trained with.
    """
    if not tokenizer_json.is_file():
        return gguf
    try:
        theirs = JsonTokenizer.from_folder(
            tokenizer_json.parent,
            bos_token_id=gguf.bos_token_id,
            eos_token_ids=gguf.eos_token_ids,
            vocab_size=gguf.vocab_size,
        )
    except AlborError:
        return gguf
    ids = range(gguf.vocab_size)
    if any(gguf.token_bytes(i) != theirs.token_bytes(i) for i in ids if theirs.token_bytes(i)):
        return gguf
    same = all(gguf.encode(text) == theirs.encode(text) for text in _PROBES)
    return gguf if same else theirs
