"""A model's weights in device memory, in the order in which decoding reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from albor_serve.config import ModelConfig
from albor_serve.errors import UnsupportedModelError
from albor_serve.kernels.layout import (
    GROUP_SIZE,
    TILE_COLS,
    TILE_ROWS,
    interleave_rows,
    repack_q4_0,
)
from albor_serve.model import rope_frequencies

__all__ = ["DecodeWeights", "check_shape", "pack_weights", "random_q4_0"]


@dataclass(frozen=True, slots=True)
class DecodeWeights:
    """Everything that decoding reads. L layers; all tensors on one device, never written."""

    config: ModelConfig
    qkv: Tensor
    """int32 [L, tile words]: query, key and value rows."""
    output: Tensor
    """int32 [L, tile words]."""
    gate_up: Tensor
    """int32 [L, tile words]: rows of `interleave_rows`."""
    down: Tensor
    """int32 [L, tile words]."""
    head: Tensor
    """int32 [tile words]: the output head, rows padded to whole bands."""
    embedding: Tensor
    """int32 [tile words]; the same tensor as `head` if tied."""
    attention_gain: Tensor
    """float32 [L, d]."""
    feed_forward_gain: Tensor
    """float32 [L, d]."""
    final_gain: Tensor
    """float32 [d]."""
    query_gain: Tensor
    """float32 [L, D]; ones without qk_norm."""
    key_gain: Tensor
    """float32 [L, D]; ones without qk_norm."""
    cos: Tensor
    """float32 [max_seq_len, D / 2]."""
    sin: Tensor
    """float32 [max_seq_len, D / 2]."""

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes that one decode step reads."""
        matrices = (self.qkv, self.output, self.gate_up, self.down, self.head)
        return sum(4 * m.numel() for m in matrices)


def check_shape(config: ModelConfig) -> None:
    """Raise UnsupportedModelError for a model that the kernels do not cover."""
    if config.qkv_bias:
        raise UnsupportedModelError(
            "the GPU kernels have no query, key and value biases (Qwen2): use the CPU backend"
        )
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads x head_dim": config.num_heads * config.head_dim,
    }
    for name, size in sizes.items():
        if size % TILE_COLS:
            raise UnsupportedModelError(
                f"{name} is {size}: the GPU kernels need a multiple of {TILE_COLS}"
            )
    if config.head_dim not in (64, 128):
        raise UnsupportedModelError(f"head_dim is {config.head_dim}: the GPU kernels do 64 and 128")


def pack_weights(
    config: ModelConfig,
    q4_rows: Callable[[str], npt.NDArray[np.uint8]],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    *,
    device: torch.device | str,
    max_seq_len: int,
) -> DecodeWeights:
    """Repack a model for decoding.

    Args:
        config: the model's shape.
        q4_rows: Q4_0 rows, uint8 [rows, row bytes], of a Hugging Face matrix name.
        vectors: norm gains by Hugging Face name, float32.
        device: where the weights go.
        max_seq_len: positions for which the rotation tables are made.

    Raises:
        UnsupportedModelError: the kernels do not cover the shape.
    """
    check_shape(config)
    d, ff = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim

    def rows(name: str) -> Tensor:
        # Files are mapped for reading alone, and torch warns of memory that it can't write to.
        return torch.from_numpy(np.require(q4_rows(name), requirements=["C", "W"])).to(device)

    def stack(make: Callable[[str], Tensor]) -> Tensor:
        return torch.stack([make(f"model.layers.{i}.") for i in range(config.num_layers)])

    def vector(name: str) -> Tensor:
        return torch.from_numpy(np.asarray(vectors[name], dtype=np.float32)).to(device)

    def qkv(prefix: str) -> Tensor:
        names = ("q_proj", "k_proj", "v_proj")
        return repack_q4_0(torch.cat([rows(f"{prefix}self_attn.{n}.weight") for n in names]), d)

    def gate_up(prefix: str) -> Tensor:
        both = [rows(f"{prefix}mlp.{n}.weight") for n in ("gate_proj", "up_proj")]
        return repack_q4_0(interleave_rows(both), d)

    def head_gain(name: str) -> Tensor:
        if config.qk_norm:
            return stack(lambda p: vector(f"{p}self_attn.{name}.weight"))
        return torch.ones(config.num_layers, config.head_dim, device=device)

    def table(name: str) -> Tensor:
        matrix = rows(name)
        padding = -matrix.shape[0] % TILE_ROWS
        return repack_q4_0(torch.cat([matrix, matrix.new_zeros(padding, matrix.shape[1])]), d)

    embedding = table("model.embed_tokens.weight")
    frequencies, attention_factor = rope_frequencies(config.rope, config.head_dim)
    angles = torch.outer(
        torch.arange(max_seq_len, dtype=torch.float64), frequencies.to(torch.float64)
    )
    return DecodeWeights(
        config=config,
        qkv=stack(qkv),
        output=stack(lambda p: repack_q4_0(rows(f"{p}self_attn.o_proj.weight"), q_size)),
        gate_up=stack(gate_up),
        down=stack(lambda p: repack_q4_0(rows(f"{p}mlp.down_proj.weight"), ff)),
        head=embedding if config.tie_embeddings else table("lm_head.weight"),
        embedding=embedding,
        attention_gain=stack(lambda p: vector(f"{p}input_layernorm.weight")),
        feed_forward_gain=stack(lambda p: vector(f"{p}post_attention_layernorm.weight")),
        final_gain=vector("model.norm.weight"),
        query_gain=head_gain("q_norm"),
        key_gain=head_gain("k_norm"),
        cos=(angles.cos() * attention_factor).to(torch.float32).to(device),
        sin=(angles.sin() * attention_factor).to(torch.float32).to(device),
    )


def random_q4_0(
    num_rows: int, num_cols: int, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Random Q4_0 rows, uint8 [rows, K / 32 * 18], whose products keep their input's size."""
    groups = num_cols // GROUP_SIZE
    out = generator.integers(0, 256, (num_rows, groups, 18), dtype=np.uint8)
    # The codes' standard deviation is 4.6, so rows of this scale have norm about 1.
    scale = (1.0 / 4.6 / np.sqrt(num_cols)) * generator.uniform(0.5, 1.5, (num_rows, groups, 1))
    out[:, :, :2] = scale.astype(np.float16).view(np.uint8)
    return out.reshape(num_rows, groups * 18)
