"""Checkpoints out: any checkpoint to one GGUF file that llama.cpp and albor read."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import gguf
import numpy as np

from albor_serve.checkpoint.base import Checkpoint
from albor_serve.checkpoint.gguf import (
    LLAMA3_HIGH_KEY,
    LLAMA3_LOW_KEY,
    ROPE_FACTORS_NAME,
    GgufCheckpoint,
    llama3_factors,
)
from albor_serve.checkpoint.names import gguf_name, rotary_order, rotary_rows
from albor_serve.checkpoint.vocab import GgufVocab, vocab_from_gguf, vocab_from_tokenizer_json
from albor_serve.config import ModelConfig, RopeConfig
from albor_serve.errors import CheckpointError, CheckpointFormatError, UnsupportedModelError
from albor_serve.quant import (
    FORMATS,
    ByteArray,
    FloatArray,
    dequantize,
    num_bytes,
    quantize_q4_0,
    quantize_q4_0_calibrated,
    quantize_q8_0,
)

__all__ = ["Progress", "QuantName", "TensorReport", "write_gguf"]

QuantName = Literal["q4_0", "q8_0", "f16", "f32"]

Progress = Callable[[int, int, str], None]
"""Called with (weights done, weights in all, name of the tensor at work)."""

_CHUNK_WEIGHTS: Final = 1 << 24

_CHOICES: Final[Mapping[QuantName, tuple[str, ...]]] = {
    "q4_0": ("Q4_0", "F16"),
    "q8_0": ("Q8_0", "F16"),
    "f16": ("F16",),
    "f32": ("F32",),
}
"""Formats for matrices, best first; the first whose group size divides the row is taken."""

_FILE_TYPES: Final[Mapping[QuantName, gguf.LlamaFileType]] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_QUANTIZATION_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    """Hugging Face name."""
    format: str
    num_weights: int
    num_bytes: int
    relative_error: float
    """Root mean square of the rounding errors over that of the weights."""


def write_gguf(
    checkpoint: Checkpoint,
    tokenizer_json_path: Path | None,
    out: Path,
    quant: QuantName = "q4_0",
    progress: Progress | None = None,
    *,
    importance: Mapping[str, FloatArray] | None = None,
    general: Mapping[str, str] | None = None,
) -> tuple[TensorReport, ...]:
    """Write a checkpoint as one GGUF file. Embeddings and head are quantized too.

    The file is written under a temporary name beside `out` and renamed when complete; a failure
    leaves nothing behind. Memory stays near one tensor's size in the new format.

    Args:
        checkpoint: the source, of either format.
        tokenizer_json_path: the tokenizer; None copies that of a GGUF source.
        out: the file to make; an existing one is replaced.
        quant: format of the matrices; vectors (norms, biases) are always F32.
        progress: told about each piece done.
        importance: what calibration found, by Hugging Face name, for q4_0: for each matrix
            either the second moments of its inputs, [cols, cols] (quantize_q4_0_calibrated), or
            only their mean squares, [cols] (quantize_q4_0). Matrices without are rounded alike.
        general: more metadata, such as {"license": "apache-2.0", "author": ...}; keys
            without a dot get the prefix "general.".

    Raises:
        CheckpointError: reading or writing failed. CheckpointFormatError: damaged weights.
        UnsupportedModelError: the model or its tokenizer cannot be expressed in GGUF.
    """
    config = checkpoint.config
    _check_expressible(config)
    vocab = _vocab(checkpoint, tokenizer_json_path, config)
    plan = {name: _choose(quant, checkpoint.shape(name)) for name in checkpoint.tensor_names}
    total = sum(math.prod(checkpoint.shape(name)) for name in plan)
    needed = sum(num_bytes(fmt, checkpoint.shape(name)) for name, fmt in plan.items())
    _check_space(out, needed)
    reports = []
    with _temporary(out) as temporary:
        writer = gguf.GGUFWriter(temporary, config.architecture)
        try:
            _add_metadata(writer, checkpoint.name, config, vocab, quant, general or {})
            for name, fmt in plan.items():
                _announce(writer, gguf_name(name), fmt, checkpoint.shape(name))
            factors = _rope_factors(config)
            if factors is not None:
                _announce(writer, ROPE_FACTORS_NAME, "F32", factors.shape)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for name, fmt in plan.items():
                emphasis = (importance or {}).get(name) if fmt == "Q4_0" else None
                packed, report = _pack(checkpoint, name, fmt, emphasis, done, total, progress)
                writer.write_tensor_data(packed)
                reports.append(report)
                done += report.num_weights
            if factors is not None:
                writer.write_tensor_data(factors)
        finally:
            writer.close()
    return tuple(reports)


def _check_expressible(config: ModelConfig) -> None:
    """Refuse what llama.cpp would not load, or would load and compute wrongly."""
    arch = config.architecture
    if config.rope.scaling == "llama3" and arch != "llama":
        raise UnsupportedModelError(
            f"llama3 rope scaling cannot be written for {arch}: llama.cpp reads it for llama only"
        )
    if config.rope.scaling == "yarn" and (config.rope.beta_fast, config.rope.beta_slow) != (32, 1):
        raise UnsupportedModelError(
            f"yarn scaling with beta_fast {config.rope.beta_fast:g} and beta_slow "
            f"{config.rope.beta_slow:g} cannot be written: llama.cpp computes with 32 and 1"
        )
    if arch == "qwen2" and config.num_heads * config.head_dim != config.hidden_size:
        raise UnsupportedModelError(
            f"{config.num_heads} heads of {config.head_dim} are not {config.hidden_size} channels: "
            f"llama.cpp needs that of a qwen2 model"
        )


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A name beside `out` that replaces it on success and is removed on failure."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror or error}; check the folder and the disk"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_space(out: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise CheckpointError(f"{out.parent} cannot be written to: {error.strerror}") from error
    if free < needed:
        raise CheckpointError(
            f"{out} needs {needed >> 20} MB and the disk has {free >> 20} MB free: free some space "
            f"or write to another disk"
        )


def _vocab(checkpoint: Checkpoint, path: Path | None, config: ModelConfig) -> GgufVocab:
    if path is not None:
        return vocab_from_tokenizer_json(path, config)
    if isinstance(checkpoint, GgufCheckpoint):
        return vocab_from_gguf(checkpoint.header)
    raise CheckpointError(f"{checkpoint.path} has no tokenizer.json: download it as well")


def _choose(quant: QuantName, shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return "F32"
    return next(fmt for fmt in _CHOICES[quant] if shape[-1] % FORMATS[fmt].group_size == 0)


def _announce(writer: gguf.GGUFWriter, name: str, fmt: str, shape: tuple[int, ...]) -> None:
    kind = gguf.GGMLQuantizationType[fmt]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes(fmt, shape), kind)


def _pack(
    checkpoint: Checkpoint,
    name: str,
    fmt: str,
    importance: FloatArray | None,
    done: int,
    total: int,
    progress: Progress | None,
) -> tuple[ByteArray, TensorReport]:
    """One tensor in its new format and GGUF's row order, as flat bytes."""
    shape = checkpoint.shape(name)
    weights = math.prod(shape)
    size = num_bytes(fmt, shape)
    packed = np.empty((shape[0], size // shape[0]), dtype=np.uint8)
    step = max(1, _CHUNK_WEIGHTS // (weights // shape[0]))
    error = norm = 0.0
    for start in range(0, shape[0], step):
        if progress is not None:
            progress(done + start * (weights // shape[0]), total, name)
        rows = checkpoint.read(name, start, start + step)
        part = _encode(rows, fmt, importance, name)
        packed[start : start + step] = part
        back = dequantize(part, fmt, rows.shape)
        back -= rows
        error += float(np.vdot(back, back))
        norm += float(np.vdot(rows, rows))
    heads = rotary_rows(checkpoint.config, name)
    if heads:
        packed = packed[np.argsort(rotary_order(shape[0], heads))]
    if progress is not None:
        progress(done + weights, total, name)
    relative = math.sqrt(error / norm) if norm > 0 else 0.0
    return packed.reshape(-1), TensorReport(name, fmt, weights, size, relative)


def _encode(rows: FloatArray, fmt: str, importance: FloatArray | None, name: str) -> ByteArray:
    """Rows in a format, uint8 [rows, row_bytes]."""
    try:
        if fmt == "Q4_0" and importance is not None and importance.ndim == 2:
            return quantize_q4_0_calibrated(rows, importance)
        if fmt == "Q4_0":
            return quantize_q4_0(rows, importance)
        if fmt == "Q8_0":
            return quantize_q8_0(rows)
    except (CheckpointFormatError, UnsupportedModelError) as error:
        raise type(error)(f"tensor {name!r}: {error}") from error
    if not np.isfinite(rows).all() or (fmt == "F16" and np.abs(rows).max() > 65504):
        raise CheckpointFormatError(
            f"tensor {name!r} holds a weight that is not finite or does not fit {fmt}: the "
            f"checkpoint is damaged or its training diverged"
        )
    encoded = rows.astype("<f2" if fmt == "F16" else "<f4")
    return encoded.reshape(len(rows), -1).view(np.uint8)


def _add_metadata(
    writer: gguf.GGUFWriter,
    name: str,
    config: ModelConfig,
    vocab: GgufVocab,
    quant: QuantName,
    general: Mapping[str, str],
) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    for key, value in general.items():
        writer.add_string(key if "." in key else f"general.{key}", value)
    writer.add_file_type(_FILE_TYPES[quant])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    _add_rope_scaling(writer, config.architecture, config.rope)
    for key, value, type_name in vocab.entries:
        kind = type_name.removeprefix("array[").removesuffix("]").upper()
        if type_name.startswith("array["):
            element = gguf.GGUFValueType[kind]
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=element)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType[kind])


def _add_rope_scaling(writer: gguf.GGUFWriter, arch: str, rope: RopeConfig) -> None:
    prefix = f"{arch}.rope.scaling"
    if rope.scaling in ("linear", "yarn"):
        writer.add_string(f"{prefix}.type", rope.scaling)
        writer.add_float32(f"{prefix}.factor", rope.factor)
    if rope.scaling in ("llama3", "yarn"):
        writer.add_uint32(f"{prefix}.original_context_length", rope.original_max_seq_len)
    if rope.scaling == "llama3":
        writer.add_float32(LLAMA3_LOW_KEY, rope.low_freq_factor)
        writer.add_float32(LLAMA3_HIGH_KEY, rope.high_freq_factor)
    if rope.scaling == "yarn" and rope.attention_factor is not None:
        # llama.cpp multiplies this with 0.1·ln(factor) + 1.
        base = 0.1 * math.log(rope.factor) + 1
        writer.add_float32(f"{prefix}.attn_factor", rope.attention_factor / base)


def _rope_factors(config: ModelConfig) -> FloatArray | None:
    if config.rope.scaling != "llama3":
        return None
    return llama3_factors(config.rope, config.head_dim)
