"""What must hold of a GGUF file before llama.cpp may touch it.

llama.cpp reports most damage as an error, but some it meets with an assertion, which ends the
process. Each check here stands for one of those (found by fuzzing).
"""

from __future__ import annotations

from typing import Final

from albor_serve.checkpoint.gguf import GgufCheckpoint
from albor_serve.checkpoint.gguf_header import GgufHeader
from albor_serve.errors import CheckpointFormatError, UnsupportedModelError

__all__ = ["check_for_native", "is_wholly_checked"]

_MAX_LAYERS: Final = 512
_ROPE_SCALINGS: Final = ("none", "linear", "yarn", "longrope")
_ALIGNMENT: Final = 32
"""Of the tensors that llama.cpp uses where the file is mapped (TENSOR_ALIGNMENT in ggml)."""
_TOKENS_KEY: Final = "tokenizer.ggml.tokens"
_OWN_ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
_HEAD_KEYS: Final = ("attention.key_length", "attention.value_length", "rope.dimension_count")


def check_for_native(header: GgufHeader) -> None:
    """Refuse a file on which llama.cpp would abort.

    For architectures that albor runs itself every shape is checked; for others the layers, the
    rope scaling, the vocabulary and the places of tensors.

    Raises:
        CheckpointFormatError: the file is damaged or hostile.
        UnsupportedModelError: a shape that neither albor nor llama.cpp runs.
    """
    architecture = header.architecture
    layers = header.metadata.get(f"{architecture}.block_count", 1)
    if not isinstance(layers, int) or not 0 < layers <= _MAX_LAYERS:
        raise CheckpointFormatError(
            f"{header.path}: {architecture[:40]}.block_count must be 1 to {_MAX_LAYERS}: download "
            f"it again"
        )
    key = f"{architecture}.rope.scaling.type"
    if key in header.metadata and header.metadata.string(key) not in _ROPE_SCALINGS:
        raise UnsupportedModelError(
            f"{header.path}: rope scaling {header.metadata.string(key)[:40]!r} is not one of "
            f"{', '.join(_ROPE_SCALINGS)}: convert the model again"
        )
    if any(tensor.offset % _ALIGNMENT for tensor in header.tensors.values()):
        raise UnsupportedModelError(
            f"{header.path}: its tensors do not begin at multiples of {_ALIGNMENT} bytes: convert "
            f"it again, without general.alignment"
        )
    _check_tokens(header)
    experts = header.metadata.get(f"{architecture}.expert_count", 0)
    used = header.metadata.get(f"{architecture}.expert_used_count", 0)
    if isinstance(experts, int) and experts > 0 and used == 0:
        raise CheckpointFormatError(
            f"{header.path} has {experts} experts and uses none of them: convert it again"
        )
    if architecture in _OWN_ARCHITECTURES:
        _check_heads(header)
        try:
            _ = GgufCheckpoint(header).config
        except UnsupportedModelError:
            return  # llama.cpp runs more than albor's own engine does


def is_wholly_checked(checkpoint: GgufCheckpoint) -> bool:
    """Whether every tensor and size of a file was checked, beyond what `check_for_native` does.

    Other files may still end the process that loads them with llama.cpp.

    Raises:
        CheckpointFormatError: the file is damaged.
    """
    try:
        _ = checkpoint.config
    except UnsupportedModelError:
        return False
    return True


def _check_tokens(header: GgufHeader) -> None:
    if _TOKENS_KEY not in header.metadata:
        return
    # llama.cpp gives empty tokens names of their own.
    tokens = [token for token in header.metadata.raw_strings(_TOKENS_KEY) if token]
    if len(set(tokens)) != len(tokens):
        raise CheckpointFormatError(
            f"{header.path}: a token occurs twice in its vocabulary: download or convert it again"
        )
    if header.metadata.get("tokenizer.ggml.model") == "llama":
        known = set(tokens)
        if any(
            b"<0x%02X>" % byte not in known and bytes([byte]) not in known for byte in range(256)
        ):
            raise CheckpointFormatError(
                f"{header.path}: its SentencePiece vocabulary lacks tokens for single bytes: "
                f"download or convert it again"
            )


def _check_heads(header: GgufHeader) -> None:
    """Key, value and rotary size of a head must be the same, whether given or not."""
    metadata, arch = header.metadata, header.architecture
    heads = metadata.get(f"{arch}.attention.head_count")
    width = metadata.integer(f"{arch}.embedding_length")
    keys = [key for name in _HEAD_KEYS if (key := f"{arch}.{name}") in metadata]
    sizes = {metadata.integer(key) for key in keys}
    if isinstance(heads, int) and heads > 0 and f"{arch}.{_HEAD_KEYS[0]}" not in metadata:
        sizes.add(width // heads)
    if len(sizes) > 1:
        raise UnsupportedModelError(
            f"{header.path}: a head's key, value and rotary sizes are {sorted(sizes)[:3]}: they "
            f"must be equal for a {arch} model"
        )
