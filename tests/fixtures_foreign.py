"""Tiny random models of architectures that only llama.cpp runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from tests.fixtures_tiny import add_vocabulary, save_gguf, tiny_model

__all__ = ["CONFIG", "FOREIGN", "save_gpt2", "save_mamba", "save_phi2", "save_smollm3"]

CONFIG: Final = tiny_model("llama")[0]
"""Its vocabulary is that of every model here."""
_WIDTH: Final = 32
_SEQ_LEN: Final = 256


class _Writer:
    """Random tensors of given shapes into a file."""

    def __init__(self, path: Path, arch: str) -> None:
        self.path = path
        self.file = gguf.GGUFWriter(path, arch)
        self._rng = np.random.default_rng(1)

    def add(self, name: str, *shape: int, std: float = 0.2, mean: float = 0.0) -> None:
        array = mean + std * self._rng.standard_normal(shape)
        self.file.add_tensor(name, array.astype(np.float32))

    def linear(self, name: str, rows: int, cols: int) -> None:
        self.add(f"{name}.weight", rows, cols)
        self.add(f"{name}.bias", rows)

    def norm(self, name: str) -> None:
        self.add(f"{name}.weight", _WIDTH, mean=1.0)
        self.add(f"{name}.bias", _WIDTH)

    def finish(self) -> Path:
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()
        return self.path


def save_gpt2(path: Path) -> Path:
    """Learned positions, one matrix for queries, keys and values, biases everywhere."""
    writer = _transformer(path, "gpt2")
    writer.add("token_embd.weight", CONFIG.vocab_size, _WIDTH)
    writer.add("position_embd.weight", _SEQ_LEN, _WIDTH)
    writer.norm("output_norm")
    for layer in ("blk.0", "blk.1"):
        writer.norm(f"{layer}.attn_norm")
        writer.norm(f"{layer}.ffn_norm")
        _layer(writer, layer)
    return writer.finish()


def save_phi2(path: Path) -> Path:
    """Rotary positions in half of each head, attention and feed-forward side by side."""
    writer = _transformer(path, "phi2")
    writer.file.add_rope_dimension_count(8)
    writer.add("token_embd.weight", CONFIG.vocab_size, _WIDTH)
    writer.norm("output_norm")
    writer.linear("output", CONFIG.vocab_size, _WIDTH)
    for layer in ("blk.0", "blk.1"):
        writer.norm(f"{layer}.attn_norm")
        _layer(writer, layer)
    return writer.finish()


def save_mamba(path: Path) -> Path:
    """A recurrent model, whose state can't be cut."""
    inner, state, rank = 64, 16, 4
    writer = _Writer(path, "mamba")
    file = writer.file
    file.add_context_length(_SEQ_LEN)
    file.add_embedding_length(_WIDTH)
    file.add_feed_forward_length(0)
    file.add_head_count(0)
    file.add_block_count(2)
    file.add_ssm_conv_kernel(4)
    file.add_ssm_inner_size(inner)
    file.add_ssm_state_size(state)
    file.add_ssm_time_step_rank(rank)
    file.add_layer_norm_rms_eps(1e-5)
    add_vocabulary(file, CONFIG)
    writer.add("token_embd.weight", CONFIG.vocab_size, _WIDTH, std=0.5)
    writer.add("output_norm.weight", _WIDTH, mean=1.0)
    for layer in ("blk.0.", "blk.1."):
        writer.add(layer + "attn_norm.weight", _WIDTH, mean=1.0)
        writer.add(layer + "ssm_in.weight", 2 * inner, _WIDTH)
        writer.add(layer + "ssm_conv1d.weight", inner, 4)
        writer.add(layer + "ssm_conv1d.bias", inner)
        writer.add(layer + "ssm_x.weight", rank + 2 * state, inner)
        writer.add(layer + "ssm_dt.weight", inner, rank)
        writer.add(layer + "ssm_dt.bias", inner)
        file.add_tensor(
            layer + "ssm_a", -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
        )
        writer.add(layer + "ssm_d", inner, mean=1.0)
        writer.add(layer + "ssm_out.weight", _WIDTH, inner)
    return writer.finish()


def save_smollm3(path: Path, arch: str = "smollm3", **changes: int) -> Path:
    """A Llama model that says it is something else.

    `changes` are values of that architecture, with two underscores for each point in a key.
    """
    config, weights = tiny_model("llama")
    values: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.vocab_size": config.vocab_size,
    }
    values |= {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return save_gguf(path, config, weights, metadata=values)


FOREIGN: Final[tuple[Callable[[Path], Path], ...]] = (
    save_gpt2,
    save_phi2,
    save_mamba,
    save_smollm3,
)


def _transformer(path: Path, arch: str) -> _Writer:
    writer = _Writer(path, arch)
    writer.file.add_context_length(_SEQ_LEN)
    writer.file.add_embedding_length(_WIDTH)
    writer.file.add_feed_forward_length(2 * _WIDTH)
    writer.file.add_head_count(2)
    writer.file.add_head_count_kv(2)
    writer.file.add_block_count(2)
    writer.file.add_layer_norm_eps(1e-5)
    add_vocabulary(writer.file, CONFIG)
    return writer


def _layer(writer: _Writer, layer: str) -> None:
    writer.linear(f"{layer}.attn_qkv", 3 * _WIDTH, _WIDTH)
    writer.linear(f"{layer}.attn_output", _WIDTH, _WIDTH)
    writer.linear(f"{layer}.ffn_up", 2 * _WIDTH, _WIDTH)
    writer.linear(f"{layer}.ffn_down", _WIDTH, 2 * _WIDTH)
