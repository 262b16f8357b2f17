"""Text to token ids and back.

`Tokenizer` is what the rest of albor asks for. `JsonTokenizer` reads Hugging Face's
`tokenizer.json`; the llama.cpp backend brings its own for GGUF files (backends/llamacpp.py).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from albor_serve.errors import (
    CheckpointError,
    CheckpointFormatError,
    RequestError,
    UnsupportedModelError,
)

__all__ = ["JsonTokenizer", "Tokenizer", "well_formed"]


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


_END_SPELLINGS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end_of_sentence|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek writes full-width bars
        "<|eot_id|>",
        "<|eom_id|>",
        "<|EOT|>",
        "<|eot|>",
        "<EOT>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|end_of_turn|>",
        "<end_of_turn>",
        "</s>",
        "<eos>",
        "<|fim_pad|>",
        "<fim_pad>",
        "<fim-pad>",
        "<|repo_name|>",
        "<repo_name>",
        "<reponame>",
        "<|file_sep|>",
        "<|file_separator|>",
        "<file_sep>",
    }
)
"""Control tokens that end an answer wherever a vocabulary has them. A model that has finished the
middle often goes on with the next file of its training data: FIM padding, repository name and
file separator end an answer too, as they do in llama.cpp."""

_CONTROL_BRACKETS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<[", "]>"))
_CONTROL_SPELLINGS = frozenset(
    {
        "<s>",
        "<pad>",
        "<unk>",
        "<mask>",
        "<bos>",
        "<fim_prefix>",
        "<fim_middle>",
        "<fim_suffix>",
        "<fim-prefix>",
        "<fim-middle>",
        "<fim-suffix>",
        "<filename>",
        "[PREFIX]",
        "[MIDDLE]",
        "[SUFFIX]",
    }
)
_METASPACE = "\u2581"


class JsonTokenizer:
    """`Tokenizer` over a Hugging Face tokenizer.json. Safe to call from several threads.

    Byte-level vocabularies (GPT-2 and its heirs) encode every text as it is. Vocabularies of the
    SentencePiece kind may put a space before the text, as their models were trained.

    Some published files (Qwen2.5-Coder's) do not mark their FIM tokens as special. Added tokens
    that look like control tokens are therefore treated as special whatever the file says.
    """

    def __init__(
        self,
        text: str,
        *,
        bos_token_id: int | None = None,
        adds_bos: bool | None = None,
        eos_token_ids: Iterable[int] = (),
        vocab_size: int | None = None,
    ) -> None:
        """Read the text of a tokenizer.json.

        Args:
            text: the JSON.
            bos_token_id: the token that prompts may begin with; None takes the one that the
                file's own post-processor puts first, if it does.
            adds_bos: whether prompts must begin with it; None asks the post-processor.
            eos_token_ids: tokens that end an answer, besides the well-known ones.
            vocab_size: rows of the model's embedding, where there are more than tokens; the ids
                without a token stand for no bytes.

        Raises:
            CheckpointFormatError: the text is not a tokenizer.json. UnsupportedModelError: its
            tokens cannot be turned into bytes one by one. CheckpointError: more tokens than
            `vocab_size`.
        """
        data = _parse(text)
        added: list[dict[str, Any]] = data.get("added_tokens") or []
        for token in added:
            token["special"] = bool(token["special"]) or _looks_special(token["content"])
        self._json = json.dumps(data, ensure_ascii=False)
        self._plain = _build(self._json)
        # Special spellings are ordinary text to this one; `encode` builds the other when asked.
        self._plain.encode_special_tokens = True
        self._parsing: Any = None
        self._lock = threading.Lock()
        self._special = {t["content"]: int(t["id"]) for t in added if t["special"]}
        self._table = _token_table(data, self._plain.get_vocab(with_added_tokens=True))
        if vocab_size is not None:
            if len(self._table) > vocab_size:
                raise CheckpointError(
                    f"the tokenizer has {len(self._table)} tokens, but the model only "
                    f"{vocab_size}: the files do not belong together"
                )
            self._table += [b""] * (vocab_size - len(self._table))
        first = self._first_added_token()
        self._bos = first if bos_token_id is None else bos_token_id
        self._adds_bos = (first is not None) if adds_bos is None else adds_bos
        self._adds_bos = self._adds_bos and self._bos is not None
        known = {i for spelling, i in self._special.items() if spelling in _END_SPELLINGS}
        self._eos = frozenset(known | set(eos_token_ids))

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        vocab_size: int | None = None,
    ) -> JsonTokenizer:
        """Read tokenizer.json, and tokenizer_config.json where there is one, from a folder.

        The arguments are the model configuration's, if known. The configuration file's
        bos_token, eos_token and add_bos_token are taken into account.

        Raises:
            CheckpointError: see `__init__`; also when tokenizer.json cannot be read.
        """
        folder = Path(folder)
        text = _read(folder / "tokenizer.json")
        settings: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            settings = _parse_object(_read(folder / "tokenizer_config.json"))
        ids = {t["content"]: int(t["id"]) for t in _parse(text).get("added_tokens") or []}

        def configured(name: str) -> int | None:
            value = settings.get(name)
            spelling = value.get("content") if isinstance(value, dict) else value
            return ids.get(spelling) if isinstance(spelling, str) else None

        eos = configured("eos_token")
        bos = configured("bos_token")
        adds_bos = settings.get("add_bos_token")
        return cls(
            text,
            bos_token_id=bos if bos is not None else bos_token_id,
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
            eos_token_ids=[*eos_token_ids, *([] if eos is None else [eos])],
            vocab_size=vocab_size,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids; valid ids are 0 to vocab_size - 1."""
        return len(self._table)

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
        """Every token that ends an answer."""
        return self._eos

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; see `Tokenizer.encode`."""
        tokenizer = self._with_special() if parse_special else self._plain
        ids: list[int] = tokenizer.encode(well_formed(text), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of a token sequence, control tokens left out.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        return b"".join([self.token_bytes(i) for i in ids])

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for in running text; b"" for control tokens.

        Raises:
            RequestError: the id is outside the vocabulary.
        """
        if not 0 <= token_id < len(self._table):
            raise RequestError(
                f"token id {token_id} is outside the vocabulary: use 0 to {len(self._table) - 1}"
            )
        return self._table[token_id]

    def special_id(self, spelling: str) -> int | None:
        """Id of the control token spelled exactly so, or None where the vocabulary has none."""
        return self._special.get(spelling)

    def _with_special(self) -> Any:
        """The tokenizer that recognises special spellings. Whether they count is a setting of the
        object, not of the call, so that two threads need two objects."""
        with self._lock:
            if self._parsing is None:
                self._parsing = _build(self._json)
            return self._parsing

    def _first_added_token(self) -> int | None:
        """The control token that the post-processor puts before a text, if it does."""
        if self._plain.num_special_tokens_to_add(False) == 0:
            return None
        ids = self._with_special().encode("a", add_special_tokens=True).ids
        return int(ids[0]) if ids and ids[0] in self._special.values() else None


def _looks_special(spelling: str) -> bool:
    if spelling in _END_SPELLINGS or spelling in _CONTROL_SPELLINGS:
        return True
    return any(
        spelling.startswith(left) and spelling.endswith(right) and len(spelling) > 4
        for left, right in _CONTROL_BRACKETS
    )


def _build(text: str) -> Any:
    # Imported here: a server with a GGUF file never needs it.
    from tokenizers import Tokenizer as RustTokenizer

    try:
        tokenizer = RustTokenizer.from_str(text)
    except BaseException as error:
        # The Rust side raises no narrower class, and panics as a BaseException of its own.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointFormatError(
            f"tokenizer.json cannot be read ({reason}): take it from the model's source again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parse_object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(
            f"the tokenizer's file is not JSON ({error}): take it from the model's source again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointFormatError(
            "the tokenizer's file is not a JSON object: take it from the model's source again"
        )
    return data


def _parse(text: str) -> dict[str, Any]:
    data = _parse_object(text)
    added = data.get("added_tokens") or []
    sound = isinstance(added, list) and all(
        isinstance(t, dict)
        and isinstance(t.get("content"), str)
        and type(t.get("id")) is int
        and t["id"] >= 0
        and isinstance(t.get("special", False), bool)
        for t in added
    )
    if not sound or not isinstance(data.get("model"), dict):
        raise CheckpointFormatError(
            "tokenizer.json lacks a model or has malformed added_tokens: take it from the "
            "model's source again"
        )
    for token in added:
        token.setdefault("special", False)
    return data


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointFormatError(f"{path} is not UTF-8 text") from error


def _token_table(data: dict[str, Any], vocab: dict[str, int]) -> list[bytes]:
    """Bytes of each id in running text; b"" for control tokens and for ids without a token."""
    kinds = _component_types(data.get("decoder")) | _component_types(data.get("pre_tokenizer"))
    added = {int(t["id"]): t for t in data.get("added_tokens") or []}
    if "ByteLevel" in kinds:
        to_bytes = _byte_level_bytes
    elif kinds & {"Metaspace", "ByteFallback"} or data["model"].get("byte_fallback"):
        to_bytes = _metaspace_bytes
    else:
        raise UnsupportedModelError(
            "tokenizer.json is neither byte-level nor of the SentencePiece kind: albor needs a "
            "vocabulary whose tokens are bytes"
        )
    size = 1 + max([*vocab.values(), *added], default=-1)
    # Unused ids are few in real files; a hostile one must not make a table of terabytes.
    if size > 2 * (len(vocab) + len(added)) + 65_536:
        raise CheckpointFormatError(
            f"tokenizer.json has {len(vocab)} tokens but an id of {size - 1}: take it from the "
            f"model's source again"
        )
    table = [b""] * size
    for spelling, token_id in vocab.items():
        if token_id not in added:
            table[token_id] = to_bytes(spelling)
    for token_id, token in added.items():
        table[token_id] = b"" if token["special"] else str(token["content"]).encode("utf-8")
    return table


def _component_types(component: Any) -> set[str]:
    """Types of a pre-tokenizer or decoder and of all its parts."""
    if not isinstance(component, dict):
        return set()
    types = {str(component.get("type"))}
    for part in [*component.get("pretokenizers", []), *component.get("decoders", [])]:
        types |= _component_types(part)
    return types


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (Radford et al. 2019):
    printable Latin-1 bytes are themselves, the others follow from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF_LETTER = _byte_alphabet()


def _byte_level_bytes(spelling: str) -> bytes:
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in spelling])
    except KeyError:  # not spelled in the alphabet: a token that was put in as it is
        return spelling.encode("utf-8")


def _metaspace_bytes(spelling: str) -> bytes:
    if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
        try:
            return bytes([int(spelling[3:5], 16)])
        except ValueError:
            pass
    return spelling.replace(_METASPACE, " ").encode("utf-8")
