"""Byte-level BPE with Qwen2's pre-tokenizer, learned from the corpus.

The file is an ordinary `tokenizer.json`, which transformers, llama.cpp and vLLM read. Merges for
runs of spaces and tabs are put before the learned ones, so that every indentation is one token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from albor_train.errors import DataError

__all__ = [
    "END_OF_TEXT",
    "FILE_SEP",
    "FIM_PAD",
    "REPO_NAME",
    "SPECIALS",
    "TrainingTokenizer",
    "bytes_per_token",
    "open_encoder",
    "train_tokenizer",
]

END_OF_TEXT: Final = "<|endoftext|>"
FIM_PAD: Final = "<|fim_pad|>"
REPO_NAME: Final = "<|repo_name|>"
FILE_SEP: Final = "<|file_sep|>"
SPECIALS: Final = (
    END_OF_TEXT,
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    FIM_PAD,
    REPO_NAME,
    FILE_SEP,
    *(f"<|reserved_{number}|>" for number in range(7, 16)),
)
"""Control tokens in the order of their ids, from 0."""

_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer; llama.cpp knows it as "qwen2"."""

_SPACE, _TAB = "Ġ", "ĉ"  # byte-level BPE's letters for the bytes 0x20 and 0x09
_LONGEST_SPACES: Final = 64
_LONGEST_TABS: Final = 16


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """Learn a vocabulary of exactly `vocab_size` tokens and write tokenizer.json.

    Args:
        texts: pieces of the corpus.
        vocab_size: tokens, the control tokens, 256 bytes and indentations included.
        out: folder that gets tokenizer.json and tokenizer_config.json.

    Raises:
        DataError: the text is too small to learn so many tokens from.
    """
    tokenizer = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        # Some learned merges are replaced by the indentation's own.
        vocab_size=vocab_size + 256,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    indentation = [
        *_run_merges(_SPACE, _LONGEST_SPACES),
        *_run_merges(_TAB, _LONGEST_TABS),
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - len(SPECIALS) - len(alphabet) - len(indentation)
    others = [
        (left, right) for left, right in learned if set(left + right) not in ({_SPACE}, {_TAB})
    ]
    if room < 0 or len(others) < room:
        raise DataError(
            f"the text gives only {len(others)} merges, but a vocabulary of {vocab_size} needs "
            f"{room}: use more text or a smaller vocabulary"
        )
    merges = [*indentation, *others[:room]]
    vocab = {token: number for number, token in enumerate([*SPECIALS, *alphabet])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    if len(vocab) != vocab_size:
        raise DataError(f"{len(vocab)} different tokens instead of {vocab_size}")
    final = _pipeline(models.BPE(vocab=vocab, merges=merges))
    final.add_special_tokens(list(SPECIALS))
    final.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": FIM_PAD,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def _pipeline(model: models.BPE) -> Any:
    tokenizer = Tokenizer(model)
    # No normalizer: a completion must continue the very bytes that were typed.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _run_merges(letter: str, longest: int) -> Iterator[tuple[str, str]]:
    """Merges that make one token of any run of 2 to `longest` equal letters.

    The powers of two first: then a run is its binary digits, longest first, and each further
    merge joins the two last digits' tokens.
    """
    power = 2
    while power <= longest:
        yield letter * (power // 2), letter * (power // 2)
        power *= 2
    for length in range(3, longest):
        high = 1 << (length.bit_length() - 1)
        if length != high:
            yield letter * high, letter * (length - high)


class TrainingTokenizer:
    """A trained tokenizer.json, as data preparation and evaluation use it.

    Text is never parsed for control tokens. Safe to share between threads.
    """

    def __init__(self, path: Path) -> None:
        """Load `path` (the file or its folder).

        Raises:
            DataError: it can't be read or lacks a control token.
        """
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise DataError(f"{path} is no readable tokenizer: {error}") from error
        # Added tokens are matched in the text itself unless this is set.
        self._tokenizer.encode_special_tokens = True
        self._special: dict[str, int] = {}
        for spelling in SPECIALS[:7]:
            number = self._tokenizer.token_to_id(spelling)
            if number is None:
                raise DataError(f"{path} has no token {spelling}: train another tokenizer")
            self._special[spelling] = number
        self._control = frozenset(self._special.values())

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self._tokenizer.get_vocab_size())

    def special(self, spelling: str) -> int:
        """Id of a control token; KeyError for any other spelling."""
        return self._special[spelling]

    def token_lengths(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, int64 [vocab_size]; 0 for control tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for spelling, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            # A byte-level token has one letter for each byte.
            lengths[number] = 0 if number < len(SPECIALS) else len(spelling)
        return lengths

    def encode(self, text: str) -> list[int]:
        """Ids of a text, control spellings taken as plain text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(item.ids) for item in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        kept = [number for number in ids if number not in self._control]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))


def open_encoder(path: Path) -> Callable[[str], Sequence[int]]:
    """Text to ids by any tokenizer: a tokenizer.json, its folder, or a GGUF file's vocabulary.

    Raises:
        DataError: it can't be read.
    """
    if path.suffix != ".gguf":
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise DataError(f"{path} is no readable tokenizer: {error}") from error
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
    import llama_cpp

    try:
        vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} has no vocabulary that llama.cpp reads: {error}") from error
    return lambda text: list(
        vocabulary.tokenize(text.encode("utf-8", "replace"), add_bos=False, special=False)
    )


def bytes_per_token(encode: Callable[[str], Sequence[int]], texts: Sequence[str]) -> float:
    """UTF-8 bytes for each token that `encode` makes of the texts."""
    num_tokens = sum(len(encode(text)) for text in texts)
    return sum(len(text.encode("utf-8", "replace")) for text in texts) / max(1, num_tokens)
