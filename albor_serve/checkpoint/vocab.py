"""tokenizer.json to GGUF vocabulary, so that llama.cpp yields the same token ids.

llama.cpp has no general pre-tokenizer: a GGUF file names one of a fixed list
(tokenizer.ggml.pre). The name is found here by comparing the structure of tokenizer.json with
the structures those names stand for; anything else is refused, because a near miss gives a
model that runs and answers badly.
"""

# ruff: noqa: RUF001 - DeepSeek spells its control tokens with a full-width bar
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from albor_serve.checkpoint.files import read_json_object
from albor_serve.checkpoint.gguf import EOS_IDS_KEY
from albor_serve.checkpoint.gguf_header import GgufHeader
from albor_serve.config import ModelConfig
from albor_serve.errors import CheckpointFormatError, UnsupportedModelError

__all__ = ["GgufVocab", "vocab_from_gguf", "vocab_from_tokenizer_json"]

_MAX_TOKENIZER_BYTES: Final = 256 << 20
_MAX_TOKENIZER_CONFIG_BYTES: Final = 16 << 20

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""ggml token types."""

_FIM_SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "fim_pre": (
        *("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<｜fim▁begin｜>", "<[fim-prefix]>"),
        *("▁<PRE>", "<PRE>", "<|code_prefix|>", "[PREFIX]"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<｜fim▁hole｜>", "<[fim-suffix]>"),
        *("▁<SUF>", "<SUF>", "<|code_suffix|>", "[SUFFIX]"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<｜fim▁end｜>", "<[fim-middle]>"),
        *("▁<MID>", "<MID>", "<|code_middle|>", "[MIDDLE]"),
    ),
    "fim_pad": ("<|fim_pad|>", "<fim_pad>", "<fim-pad>"),
    "fim_rep": ("<|repo_name|>", "<|fim_repo|>", "<fim-repo>", "<repo_name>", "<reponame>"),
    "fim_sep": ("<|file_sep|>", "<file_sep>", "<filename>"),
}
"""GGUF role: spellings, most telling first (DeepSeek's "hole" stands where the suffix begins)."""

_EOT_SPELLINGS: Final = ("<|im_end|>", "<|eot_id|>", "<|EOT|>", "▁<EOT>", "<EOT>", "<|end|>")
_EOS_SPELLINGS: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<｜end▁of▁sentence｜>")

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTIONS_SPELLED: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_TAIL}"
_LLAMA3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}"
_SEED_CODER: Final = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER: Final = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[一-龥ࠀ-一가-퟿]+",
    "digits",
)

_PRE_TOKENIZERS: Final[Mapping[tuple[tuple[str, ...], bool], str]] = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_SEED_CODER,), False): "seed-coder",
    (_DEEPSEEK_CODER, False): "deepseek-coder",
}
"""(splits in order, ignore_merges): llama.cpp's name. starcoder, refact and command-r split as
smollm does, mellum as gpt-2."""


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """The tokenizer.* part of a GGUF file."""

    entries: tuple[tuple[str, Any, str], ...]
    """(key, value, type), the type as GgufMetadata.type_name spells it."""

    @property
    def values(self) -> dict[str, Any]:
        """The entries by key."""
        return {key: value for key, value, _ in self.entries}


def vocab_from_gguf(header: GgufHeader) -> GgufVocab:
    """Copy the tokenizer of another GGUF file."""
    metadata = header.metadata
    keys = [key for key in metadata if key.startswith("tokenizer.") or key == EOS_IDS_KEY]
    return GgufVocab(tuple((key, metadata[key], metadata.type_name(key)) for key in keys))


def vocab_from_tokenizer_json(path: Path, config: ModelConfig) -> GgufVocab:
    """Translate tokenizer.json (and tokenizer_config.json beside it, where there is one).

    Args:
        path: the tokenizer.json.
        config: gives the number of rows of the embedding and the end-of-text tokens.

    Raises:
        CheckpointError: the file cannot be read. CheckpointFormatError: it makes no sense.
        UnsupportedModelError: llama.cpp has no tokenizer that behaves like it.
    """
    raw = read_json_object(path, _MAX_TOKENIZER_BYTES)
    side_path = path.with_name("tokenizer_config.json")
    side: dict[str, Any] = {}
    if side_path.is_file():
        side = read_json_object(side_path, _MAX_TOKENIZER_CONFIG_BYTES)
    try:
        return _Translator(raw, side, config).vocab()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointFormatError(
            f"{path} is not a sound tokenizer.json ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:100]}): download it again"
        ) from error
    except (CheckpointFormatError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from error


class _Translator:
    """One translation. Malformed JSON surfaces as KeyError or TypeError, caught above."""

    def __init__(self, raw: dict[str, Any], side: dict[str, Any], config: ModelConfig) -> None:
        self._raw = raw
        self._side = side
        self._config = config
        self._model: dict[str, Any] = raw["model"]
        if self._model.get("type", "BPE") != "BPE":
            raise UnsupportedModelError(
                f"the tokenizer is of type {str(self._model.get('type'))[:30]!r}: only BPE "
                f"tokenizers can be converted"
            )
        self._added = {str(token["content"]): token for token in raw.get("added_tokens") or []}
        self._ids: dict[str, int] = {
            **self._model["vocab"],
            **{content: token["id"] for content, token in self._added.items()},
        }
        self._merges = [_merge_pair(merge) for merge in self._model["merges"]]
        self._is_spm = bool(self._model.get("byte_fallback"))

    def vocab(self) -> GgufVocab:
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if self._model.get(key):
                raise UnsupportedModelError(f"the tokenizer sets {key}, which llama.cpp has not")
        roles = self._roles()
        tokens, types = self._tokens(set(roles.values()))
        entries: list[tuple[str, Any, str]] = []
        if self._is_spm:
            entries.append(("tokenizer.ggml.model", "llama", "string"))
            entries.append(("tokenizer.ggml.pre", "default", "string"))
            entries.append(("tokenizer.ggml.add_space_prefix", self._space_prefix(), "bool"))
            scores = self._spm_scores(tokens, types)
            entries.append(("tokenizer.ggml.scores", scores, "array[float32]"))
        else:
            entries.append(("tokenizer.ggml.model", "gpt2", "string"))
            entries.append(("tokenizer.ggml.pre", self._pre(), "string"))
            merges = [f"{first} {second}" for first, second in self._merges]
            entries.append(("tokenizer.ggml.merges", merges, "array[string]"))
        entries.append(("tokenizer.ggml.tokens", tokens, "array[string]"))
        entries.append(("tokenizer.ggml.token_type", types, "array[int32]"))
        entries += [
            (f"tokenizer.ggml.{role}_token_id", token_id, "uint32")
            for role, token_id in roles.items()
        ]
        adds_bos = self._adds_bos(roles.get("bos"))
        entries.append(("tokenizer.ggml.add_bos_token", adds_bos, "bool"))
        entries.append(("tokenizer.ggml.add_eos_token", False, "bool"))
        eos_ids = list(self._config.eos_token_ids)
        if len(eos_ids) > 1:
            entries.append((EOS_IDS_KEY, eos_ids, "array[int32]"))
        return GgufVocab(tuple(entries))

    def _tokens(self, control: set[int]) -> tuple[list[str], list[int]]:
        size = self._config.vocab_size
        tokens: list[str | None] = [None] * size
        types = [_UNUSED] * size
        unk = self._model.get("unk_token")
        for token, token_id in self._ids.items():
            if not isinstance(token_id, int) or not 0 <= token_id < size:
                raise UnsupportedModelError(
                    f"token {token[:40]!r} has id {str(token_id)[:40]}, but the "
                    f"model's embedding has {size} rows"
                )
            if tokens[token_id] is not None:
                raise CheckpointFormatError(
                    f"tokens {str(tokens[token_id])[:40]!r} and {token[:40]!r} have the same id "
                    f"{token_id}"
                )
            if not token or not _is_encodable(token):
                raise CheckpointFormatError(f"token {token_id} is empty or not valid Unicode")
            tokens[token_id] = token
            types[token_id] = self._type(token, token_id in control, unk)
        taken = set(self._ids)
        for token_id, known in enumerate(tokens):
            if known is None:
                name = f"[PAD{token_id}]"
                while name in taken:
                    name = f"[{name}]"
                tokens[token_id] = name
        return [token for token in tokens if token is not None], types

    def _type(self, token: str, is_control: bool, unk: str | None) -> int:
        if self._is_spm and token == unk:
            return _UNKNOWN
        added = self._added.get(token)
        # Qwen and DeepSeek mark some of their control tokens as ordinary added ones.
        looks_special = token[:2] in ("<|", "<｜") and token[-2:] in ("|>", "｜>")
        if is_control or (added is not None and (added.get("special") or looks_special)):
            return _CONTROL
        if added is not None:
            return _USER_DEFINED
        if self._is_spm and _byte_of(token) is not None:
            return _BYTE
        return _NORMAL

    def _roles(self) -> dict[str, int]:
        """GGUF role to token id. bos and eos must not be left to llama.cpp's defaults (id 11)."""
        roles: dict[str, int | None] = {
            "bos": self._config.bos_token_id,
            "eos": self._eos(),
            "eot": self._first(_EOT_SPELLINGS),
            "unknown": self._id_of(self._model.get("unk_token")),
            "padding": self._side_token("pad_token"),
        }
        if roles["bos"] is None:
            roles["bos"] = self._side_token("bos_token")
        if len(self._config.eos_token_ids) > 1:
            roles["eot"] = self._config.eos_token_ids[1]
        for role, spellings in _FIM_SPELLINGS.items():
            roles[role] = self._first(spellings)
        size = self._config.vocab_size
        return {
            role: token_id
            for role, token_id in roles.items()
            if token_id is not None and 0 <= token_id < size
        }

    def _eos(self) -> int:
        candidates = [
            *self._config.eos_token_ids[:1],
            self._side_token("eos_token"),
            self._first(_EOS_SPELLINGS),
        ]
        for token_id in candidates:
            if token_id is not None:
                return token_id
        raise UnsupportedModelError(
            "no end-of-text token is known: set eos_token_id in config.json"
        )

    def _first(self, spellings: Iterable[str]) -> int | None:
        return next((self._ids[text] for text in spellings if text in self._ids), None)

    def _side_token(self, key: str) -> int | None:
        value = self._side.get(key)
        return self._id_of(value.get("content") if isinstance(value, dict) else value)

    def _id_of(self, token: Any) -> int | None:
        return self._ids.get(token) if isinstance(token, str) else None

    def _adds_bos(self, bos: int | None) -> bool:
        setting = self._side.get("add_bos_token")
        if isinstance(setting, bool):
            return setting and bos is not None
        pending = [self._raw.get("post_processor")]
        while pending:
            processor = pending.pop()
            if not processor:
                continue
            pending += processor.get("processors") or []
            template = processor.get("single") or []
            if processor["type"] == "TemplateProcessing" and "SpecialToken" in template[0]:
                return bos is not None
        return False

    def _pre(self) -> str:
        normalizer = self._raw.get("normalizer")
        # llama.cpp does not normalize; NFC leaves nearly all code as it is, and Qwen's GGUF
        # files live with the difference.
        if normalizer and normalizer != {"type": "NFC"} and normalizer.get("normalizers") != []:
            raise UnsupportedModelError(
                f"the tokenizer normalizes text ({str(normalizer.get('type'))[:30]}): llama.cpp "
                f"cannot do the same"
            )
        splits = tuple(self._splits(self._raw.get("pre_tokenizer")))
        ignore_merges = bool(self._model.get("ignore_merges"))
        name = _PRE_TOKENIZERS.get((splits, ignore_merges))
        if name is None:
            raise UnsupportedModelError(
                f"llama.cpp's pre-tokenizer for splits {str(splits)[:160]} with ignore_merges="
                f"{ignore_merges} is not known to albor: use a GGUF file made by the model's author"
            )
        return name

    def _splits(self, node: Any) -> list[str]:
        """Canonical list of the splits that pre-tokenization makes, ending in byte encoding."""
        steps = node["pretokenizers"] if node and node["type"] == "Sequence" else [node]
        splits = []
        for step in steps:
            kind = step["type"] if step else None
            if kind == "Split" and set(step["pattern"]) == {"Regex"} and _is_isolating(step):
                regex = step["pattern"]["Regex"].replace(_CONTRACTIONS_SPELLED, _CONTRACTIONS)
                splits.append("digits" if regex == r"\p{N}" else regex)
            elif kind == "Digits" and step.get("individual_digits"):
                splits.append("digits")
            elif kind == "ByteLevel" and step is steps[-1] and not step.get("add_prefix_space"):
                splits += [_GPT2] if step.get("use_regex", True) else []
            else:
                raise UnsupportedModelError(
                    f"the tokenizer's pre-tokenizer step {str(step)[:120]} has no counterpart in "
                    f"llama.cpp: use a GGUF file made by the model's author"
                )
        if not steps or not steps[-1] or steps[-1]["type"] != "ByteLevel":
            raise UnsupportedModelError("the tokenizer is not byte-level: it cannot be converted")
        return splits

    def _space_prefix(self) -> bool:
        """Whether a space is put before text, for SentencePiece-like tokenizers."""
        normalizer = self._raw.get("normalizer") or {}
        pre = self._raw.get("pre_tokenizer") or {}
        steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        if not pre and steps == [{"type": "Prepend", "prepend": "▁"}, replaces]:
            return True
        if not pre and steps == [replaces]:
            return False
        whole = pre.get("type") == "Metaspace" and pre.get("split") is False
        scheme = pre.get("prepend_scheme")
        if not steps and whole and pre["replacement"] == "▁" and scheme in ("always", "never"):
            return bool(scheme == "always")
        raise UnsupportedModelError(
            "the tokenizer treats spaces in a way that llama.cpp cannot copy: use a GGUF file "
            "made by the model's author"
        )

    def _spm_scores(self, tokens: Sequence[str], types: Sequence[int]) -> list[float]:
        """Scores under which llama.cpp's SentencePiece merges as the merge list does.

        llama.cpp joins any two neighbours that make up a token, best score first. That equals
        the list only if the list has every such pair, with one rank for each result.
        """
        ranks: dict[str, int] = {}
        for rank, (first, second) in enumerate(self._merges):
            ranks.setdefault(first + second, rank)
        pairs = set(self._merges)
        known = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
        for token in known:
            for cut in range(1, len(token)):
                pair = (token[:cut], token[cut:])
                if pair[0] in known and pair[1] in known and pair not in pairs:
                    raise UnsupportedModelError(
                        f"the merge list lacks a way to {token[:40]!r} that llama.cpp would take: "
                        f"use a GGUF file made by the model's author"
                    )
        lowest = -float(len(self._merges) + 1)
        return [
            -float(ranks[token]) if token in ranks else lowest if kind == _NORMAL else 0.0
            for token, kind in zip(tokens, types, strict=True)
        ]


def _merge_pair(merge: Any) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise CheckpointFormatError(f"merge {str(merge)[:40]!r} is not a pair of tokens")
    if any(" " in part or not _is_encodable(part) for part in parts):
        raise UnsupportedModelError(f"merge {str(merge)[:40]!r} cannot be written to GGUF")
    return parts[0], parts[1]


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _byte_of(token: str) -> int | None:
    """The byte that SentencePiece's <0x0A> stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _is_isolating(step: Mapping[str, Any]) -> bool:
    """Whether every match becomes a piece of its own and nothing is dropped.

    "Removed" with "invert" keeps the matches only, which for the known patterns is all text.
    """
    behaviour = (step["behavior"], bool(step.get("invert")))
    return behaviour in (("Isolated", False), ("Removed", True))
