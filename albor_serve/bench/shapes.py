"""Models of a given shape with random weights, for timing shapes that nobody has trained yet.

Speed does not depend on what the weights are, only that activations stay finite: scales are set
so that each matrix keeps the size of its input.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from albor_serve.config import ModelConfig

__all__ = ["SHAPES", "shape_gguf"]

SHAPES: Final[Mapping[str, ModelConfig]] = {
    "33m": ModelConfig(
        "qwen3", 16_384, 512, 1536, 8, 8, 4, 64, 2048, qk_norm=True, tie_embeddings=True
    ),
    "125m": ModelConfig("llama", 32_768, 768, 3072, 16, 12, 4, 64, 2048, tie_embeddings=True),
    "350m": ModelConfig("llama", 32_768, 1024, 4096, 24, 16, 4, 64, 2048, tie_embeddings=True),
}
"""The three sizes that albor is made for."""

_REVISION = 1
_SPECIALS = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_Q4_0_RMS = math.sqrt(sum((q - 8) ** 2 for q in range(16)) / 16)


def shape_gguf(name: str, config: ModelConfig | None = None, folder: Path | None = None) -> Path:
    """The Q4_0 file of a shape, made on first use in the user's cache.

    Args:
        name: of SHAPES, or any name together with `config`.
        config: the shape, if it is not one of SHAPES.
        folder: where to keep the file; None takes the cache.
    """
    from albor_serve.convert import cache_folder

    config = config or SHAPES[name]
    folder = folder or cache_folder().parent / "shapes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"random-{name}-q4_0-r{_REVISION}.gguf"
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            _write(temporary, name, config)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _write(path: Path, name: str, config: ModelConfig) -> None:
    import gguf  # here, since shapes alone are of use where the package is missing

    rng = np.random.default_rng(0)
    writer: Any = gguf.GGUFWriter(path, config.architecture)
    try:
        writer.add_name(f"random-{name}")
        writer.add_context_length(config.max_seq_len)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope.theta)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
        _add_vocabulary(writer, config.vocab_size)
        d, q = config.hidden_size, config.num_heads * config.head_dim
        kv, ffn = config.num_kv_heads * config.head_dim, config.intermediate_size
        _add_matrix(writer, rng, "token_embd", config.vocab_size, d)
        _add_norm(writer, "output_norm", d)
        for layer in range(config.num_layers):
            block = f"blk.{layer}."
            for part, size in (("attn_norm", d), ("ffn_norm", d)):
                _add_norm(writer, block + part, size)
            if config.qk_norm:
                for part in ("attn_q_norm", "attn_k_norm"):
                    _add_norm(writer, block + part, config.head_dim)
            for part, rows, columns in (
                ("attn_q", q, d),
                ("attn_k", kv, d),
                ("attn_v", kv, d),
                ("attn_output", d, q),
                ("ffn_gate", ffn, d),
                ("ffn_up", ffn, d),
                ("ffn_down", d, ffn),
            ):
                _add_matrix(writer, rng, block + part, rows, columns)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_vocabulary(writer: Any, vocab_size: int) -> None:
    """A byte-level vocabulary: control tokens, all bytes, then words that never occur."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + at) for at, byte in enumerate(others)}
    tokens = [*_SPECIALS, *(letters[byte] for byte in range(256))]
    tokens += [f"word{i}" for i in range(len(tokens), vocab_size)]
    import gguf

    kinds = [gguf.TokenType.CONTROL] * len(_SPECIALS)
    kinds += [gguf.TokenType.NORMAL] * (vocab_size - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["w o"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _add_norm(writer: Any, name: str, size: int) -> None:
    writer.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))


def _add_matrix(writer: Any, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    """Random Q4_0 groups made directly: 2 bytes of scale, 16 bytes of nibbles."""
    import gguf

    groups = rows * columns // 32
    scale = np.float16(1 / (_Q4_0_RMS * math.sqrt(columns)))
    data: npt.NDArray[np.uint8] = np.empty((groups, 18), dtype=np.uint8)
    data[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    data[:, 2:] = rng.integers(0, 256, size=(groups, 16), dtype=np.uint8)
    packed = data.reshape(rows, columns // 32 * 18)
    writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
