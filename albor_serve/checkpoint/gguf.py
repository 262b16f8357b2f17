"""GGUF files as checkpoints: Hugging Face names over a checked header."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, cast

import numpy as np

from albor_serve.checkpoint.base import CheckpointFormat, StoredTensor
from albor_serve.checkpoint.gguf_header import GgufHeader, GgufMetadata, open_gguf_header
from albor_serve.checkpoint.names import gguf_name, rotary_order, rotary_rows, tensor_shapes
from albor_serve.config import Architecture, ModelConfig, RopeConfig
from albor_serve.errors import CheckpointFormatError, ConfigError, UnsupportedModelError
from albor_serve.quant import FloatArray, dequantize

__all__ = [
    "EOS_IDS_KEY",
    "LLAMA3_HIGH_KEY",
    "LLAMA3_LOW_KEY",
    "ROPE_FACTORS_NAME",
    "GgufCheckpoint",
    "llama3_factors",
    "open_gguf_checkpoint",
]

EOS_IDS_KEY: Final = "albor.eos_token_ids"
"""Array of int32: every token that ends an answer, where GGUF's own keys cannot name them all."""
LLAMA3_LOW_KEY: Final = "albor.rope.low_freq_factor"
LLAMA3_HIGH_KEY: Final = "albor.rope.high_freq_factor"
ROPE_FACTORS_NAME: Final = "rope_freqs.weight"
"""float32 [D/2]: what each rotary frequency is divided by (llama3 scaling)."""

_ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
_IGNORED_SUFFIXES: Final = (".attn_rot_embd", ".rope_freqs.weight", ".attn_rot_embd.weight")


@dataclass(frozen=True)
class GgufCheckpoint:
    """An opened file. Implements base.Checkpoint. `header` works for every architecture."""

    header: GgufHeader

    @property
    def path(self) -> Path:
        """The file."""
        return self.header.path

    @property
    def format(self) -> CheckpointFormat:
        """Always "gguf"."""
        return "gguf"

    @property
    def name(self) -> str:
        """The file's name without ".gguf"."""
        return self.path.name.removesuffix(".gguf")

    @cached_property
    def config(self) -> ModelConfig:
        """See base.Checkpoint."""
        config = _config(self.header)
        _check_tensors(self.header, config)
        return config

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return tensor_shapes(self.config)

    @property
    def tensor_names(self) -> Sequence[str]:
        """See base.Checkpoint."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See base.Checkpoint."""
        return self._shapes[name]

    def tensor_format(self, name: str) -> str:
        """How one tensor is stored, such as "Q4_0"; reads none of it. KeyError if not listed."""
        return self.header.tensors[gguf_name(name)].type

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """See base.Checkpoint."""
        stored = self.quantized(name)
        if len(stored.shape) == 1:
            return dequantize(stored.data, stored.format, stored.shape)[start:stop].copy()
        rows = stored.data[start:stop]
        return dequantize(rows, stored.format, (len(rows), *stored.shape[1:]))

    def quantized(self, name: str) -> StoredTensor:
        """See base.Checkpoint. A copy where GGUF orders rows differently, else a view."""
        shape = self._shapes[name]
        tensor = self.header.tensors[gguf_name(name)]
        data = self.header.data(tensor.name)
        heads = rotary_rows(self.config, name)
        if len(shape) > 1 or heads:
            data = data.reshape(shape[0], -1)
        if heads:
            data = data[rotary_order(shape[0], heads)]
        if len(shape) == 1:
            data = data.reshape(-1)
        return StoredTensor(tensor.type, shape, data)


def open_gguf_checkpoint(path: Path) -> GgufCheckpoint:
    """Open a .gguf file of any architecture; `config` raises for those that albor does not run.

    Raises what open_gguf_header raises.
    """
    return GgufCheckpoint(open_gguf_header(path))


def llama3_factors(rope: RopeConfig, head_dim: int) -> FloatArray:
    """What llama3 scaling divides each rotary frequency by: float32 [head_dim / 2].

    Frequencies whose wavelength fits high_freq_factor times into the original context are kept,
    those that do not fit low_freq_factor times are divided by `factor`, with a linear blend
    between (Llama 3.1; transformers' rope type "llama3").
    """
    frequency = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope.original_max_seq_len * frequency / (2 * math.pi)
    width = rope.high_freq_factor - rope.low_freq_factor
    kept = np.clip((turns - rope.low_freq_factor) / width, 0, 1)
    return (1 / (kept + (1 - kept) / rope.factor)).astype(np.float32)


def _config(header: GgufHeader) -> ModelConfig:
    architecture = header.architecture
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{header.path} holds the architecture {architecture[:40]!r}: albor's own engine runs "
            f"{', '.join(_ARCHITECTURES)}; serve it on CPU, where llama.cpp runs it"
        )
    if header.num_splits > 1:
        raise UnsupportedModelError(
            f"{header.path} is one of {header.num_splits} parts: join them with "
            f"llama-gguf-split --merge"
        )
    metadata, arch = header.metadata, architecture
    _reject_features(header)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointFormatError(
            f"{header.path} lacks the embedding matrix token_embd.weight: download it again"
        )
    num_heads = _uniform(metadata, f"{arch}.attention.head_count")
    hidden_size = metadata.integer(f"{arch}.embedding_length")
    head_dim = metadata.integer(
        f"{arch}.attention.key_length", max(1, hidden_size // max(1, num_heads))
    )
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if metadata.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{header.path}: {key} is {metadata.integer(key)} and the head dimension is "
                f"{head_dim}: albor runs models where they are equal"
            )
    try:
        return ModelConfig(
            architecture=cast("Architecture", architecture),
            vocab_size=embedding.shape[0],
            hidden_size=hidden_size,
            intermediate_size=_uniform(metadata, f"{arch}.feed_forward_length"),
            num_layers=metadata.integer(f"{arch}.block_count"),
            num_heads=num_heads,
            num_kv_heads=_uniform(metadata, f"{arch}.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            max_seq_len=metadata.integer(f"{arch}.context_length"),
            rms_norm_eps=_short(metadata.number(f"{arch}.attention.layer_norm_rms_epsilon")),
            rope=_rope(header, arch, head_dim),
            qkv_bias="blk.0.attn_q.bias" in header.tensors,
            qk_norm=arch == "qwen3",
            tie_embeddings="output.weight" not in header.tensors,
            bos_token_id=_token_id(metadata, "bos"),
            eos_token_ids=_eos_ids(metadata),
        )
    except ConfigError as error:
        raise CheckpointFormatError(f"{header.path}: {error}") from error


def _reject_features(header: GgufHeader) -> None:
    arch = header.architecture
    for key in (f"{arch}.expert_count", f"{arch}.attention.sliding_window"):
        if key in header.metadata and header.metadata.integer(key) > 0:
            raise UnsupportedModelError(
                f"{header.path}: {key} is {header.metadata.integer(key)}: albor's own engine does "
                f"not run this; serve it on CPU, where llama.cpp does"
            )


def _uniform(metadata: GgufMetadata, key: str, default: int | None = None) -> int:
    """A whole number that may be given for each layer but must be the same for all."""
    value = metadata.get(key)
    if isinstance(value, list):
        if not value or any(item != value[0] for item in value) or not isinstance(value[0], int):
            raise UnsupportedModelError(
                f"GGUF metadata {key!r} differs between layers: albor runs uniform layers only"
            )
        return value[0]
    return metadata.integer(key, default)


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-06 and not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _rope(header: GgufHeader, arch: str, head_dim: int) -> RopeConfig:
    metadata, prefix = header.metadata, f"{arch}.rope.scaling"
    theta = _short(metadata.number(f"{arch}.rope.freq_base", 10_000.0))
    kind = metadata.string(f"{prefix}.type", "none")
    if ROPE_FACTORS_NAME in header.tensors:
        return _llama3_rope(header, arch, theta, head_dim)
    if kind == "none":
        return RopeConfig(theta=theta)
    factor = _short(metadata.number(f"{prefix}.factor", 1.0))
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    if kind == "yarn":
        extra = metadata.number(f"{prefix}.attn_factor", 1.0)
        base = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return RopeConfig(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_max_seq_len=metadata.integer(
                f"{prefix}.original_context_length", metadata.integer(f"{arch}.context_length")
            ),
            beta_fast=_short(metadata.number(f"{prefix}.yarn_beta_fast", 32.0)),
            beta_slow=_short(metadata.number(f"{prefix}.yarn_beta_slow", 1.0)),
            attention_factor=None if extra == 1.0 else _short(base * extra),
        )
    raise UnsupportedModelError(
        f"{header.path}: rope scaling {kind[:40]!r} is not run by albor: it runs linear, llama3 "
        f"and yarn"
    )


def _llama3_rope(header: GgufHeader, arch: str, theta: float, head_dim: int) -> RopeConfig:
    """Recover llama3 scaling from its table of factors, which is all that GGUF keeps of it."""
    tensor = header.tensors[ROPE_FACTORS_NAME]
    if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
        raise CheckpointFormatError(
            f"{header.path}: {ROPE_FACTORS_NAME} is {tensor.type} {tensor.shape}, it must be F32 "
            f"({head_dim // 2},)"
        )
    table = header.data(ROPE_FACTORS_NAME).view("<f4")
    metadata = header.metadata
    original = metadata.integer(f"{arch}.rope.scaling.original_context_length", 0)
    lengths = [original] if original > 0 else [8192, *(1 << n for n in range(9, 21))]
    factor = float(table.max())
    if not 1 <= factor < 1e6:
        raise CheckpointFormatError(
            f"{header.path}: {ROPE_FACTORS_NAME} reaches {factor}: its values must be 1 or more"
        )
    for length in lengths:
        rope = RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=factor,
            original_max_seq_len=length,
            low_freq_factor=_short(metadata.number(LLAMA3_LOW_KEY, 1.0)),
            high_freq_factor=_short(metadata.number(LLAMA3_HIGH_KEY, 4.0)),
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            break
        if np.allclose(llama3_factors(rope, head_dim), table, rtol=1e-3):
            return rope
    raise UnsupportedModelError(
        f"{header.path}: the table {ROPE_FACTORS_NAME} is not llama3 scaling with its usual "
        f"parameters: serve it on CPU, where llama.cpp runs it"
    )


def _token_id(metadata: GgufMetadata, role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    return metadata.integer(key) if key in metadata else None


def _eos_ids(metadata: GgufMetadata) -> tuple[int, ...]:
    more = metadata.get(EOS_IDS_KEY, [])
    ids = [_token_id(metadata, role) for role in ("eos", "eot", "eom")]
    ids += [item for item in more if isinstance(item, int)] if isinstance(more, list) else []
    return tuple(dict.fromkeys(item for item in ids if item is not None))


def _check_tensors(header: GgufHeader, config: ModelConfig) -> None:
    if config.num_layers > len(header.tensors):  # before the loop: the number is the file's claim
        raise CheckpointFormatError(
            f"{header.path} claims {config.num_layers} layers and has {len(header.tensors)} "
            f"tensors: download it again"
        )
    expected = {gguf_name(name): shape for name, shape in tensor_shapes(config).items()}
    for name, shape in expected.items():
        if name not in header.tensors:
            raise CheckpointFormatError(
                f"{header.path} lacks tensor {name!r}, which a {config.architecture} model of "
                f"{config.num_layers} layers has: download or convert it again"
            )
        found = header.tensors[name].shape
        if found != shape:
            raise CheckpointFormatError(
                f"{header.path}: tensor {name!r} has shape {found}, its metadata calls for {shape}"
            )
    for name in header.tensors:
        ignored = name == ROPE_FACTORS_NAME or name.endswith(_IGNORED_SUFFIXES)
        if name not in expected and not ignored:
            raise UnsupportedModelError(
                f"{header.path} has tensor {name!r}, which a {config.architecture} model as "
                f"albor's own engine runs it does not have: serve it on CPU with llama.cpp"
            )
