"""The decoder: one definition for the reference backend, GPU prefill and training.

A Llama-family transformer: pre-norm blocks of grouped-query attention with rotary positions and a
gated SiLU feed-forward. Qwen2 adds biases to q, k and v; Qwen3 normalises each head's query and
key. Parameter names are those of Hugging Face checkpoints, so `state_dict()` of a trained model
is a checkpoint.

Letters: B batch, T tokens in this call, S tokens attended to, H query heads, H_kv key-value
heads, D head dim, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from albor_serve.config import ModelConfig, RopeConfig
from albor_serve.errors import CheckpointError

__all__ = [
    "Attend",
    "Decoder",
    "KVCache",
    "RMSNorm",
    "load_decoder",
    "rope_frequencies",
    "rotate",
]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rotated queries [B, H, T, D], keys and values [B, H_kv, S, D] (S counts what the cache holds)
to [B, H, T, D]."""


@dataclass
class KVCache:
    """Keys and values of B sequences of equal length. Owned and passed in by the caller.

    `Decoder.forward` writes the rows from `length` on and then advances `length`; rows at and
    beyond `length` mean nothing, so lowering `length` is all it takes to rewind.
    """

    keys: list[Tensor]
    """For each layer [B, H_kv, max_seq_len, D]."""
    values: list[Tensor]
    """For each layer [B, H_kv, max_seq_len, D]."""
    length: int = 0

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        max_seq_len: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache that holds nothing yet and has room for `max_seq_len` tokens."""
        shape = (batch_size, config.num_kv_heads, max_seq_len, config.head_dim)

        def layers() -> list[Tensor]:
            return [
                torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]

        return cls(keys=layers(), values=layers())

    @property
    def max_seq_len(self) -> int:
        """Tokens that fit."""
        return int(self.keys[0].shape[2])


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Rotation speed of each pair of channels, and the scale of the rotated vectors.

    Sources: Su et al. 2021 (RoPE); Chen et al. 2023 (linear); Llama 3.1's model card (llama3);
    Peng et al. 2023, "YaRN", section 3.4, with the bounds rounded outwards as in its code.

    Returns:
        float32 [head_dim / 2] in radians for each position, and the factor for cos and sin
        (1 except for yarn).
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = rope.theta**-pair
    if rope.scaling == "none":
        return plain.float(), 1.0
    if rope.scaling == "linear":
        return (plain / rope.factor).float(), 1.0
    if rope.scaling == "llama3":
        turns = rope.original_max_seq_len * plain / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        return (keep * plain + (1 - keep) * plain / rope.factor).float(), 1.0

    def channel_with_turns(turns: float) -> float:
        wavelength = rope.original_max_seq_len / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(channel_with_turns(rope.beta_fast)), 0)
    high = min(math.ceil(channel_with_turns(rope.beta_slow)), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64)
    interpolate = ((index - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    scale = rope.attention_factor
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1.0
    return (interpolate * plain / rope.factor + (1 - interpolate) * plain).float(), scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i of the first half of D against channel i of the second half.

    Args:
        x: [B, heads, T, D]. cos, sin: [B, 1, T, D / 2], of x's dtype; or all three with heads
            and T exchanged.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RMSNorm(nn.Module):  # type: ignore[misc]
    """Divide by the root mean square over the last dimension (Zhang and Sennrich 2019).

    Computed in float32 whatever the input's dtype, and returned in that dtype.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention (Ainslie et al. 2023), causal."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, head_dim = config.hidden_size, config.head_dim
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = head_dim
        bias = config.qkv_bias
        self.q_proj = nn.Linear(d, config.num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d, config.num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d, config.num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * head_dim, d, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        layer: int,
        attend: Attend | None = None,
    ) -> Tensor:
        """[B, T, d] to the same shape. With a cache, writes its rows from cache.length on."""
        batch, num_tokens, _ = x.shape

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(batch, num_tokens, count, self.head_dim)

        q = heads(self.q_proj(x), self.num_heads)
        k = heads(self.k_proj(x), self.num_kv_heads)
        v = heads(self.v_proj(x), self.num_kv_heads).transpose(1, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), cos, sin)
        k = rotate(k.transpose(1, 2), cos, sin)
        mask = None
        if cache is not None:
            end = cache.length + num_tokens
            cache.keys[layer][:, :, cache.length : end] = k
            cache.values[layer][:, :, cache.length : end] = v
            k = cache.keys[layer][:, :, :end]
            v = cache.values[layer][:, :, :end]
            if num_tokens > 1 and attend is None:
                row = torch.arange(cache.length, end, device=x.device)
                mask = torch.arange(end, device=x.device)[None, :] <= row[:, None]
        if attend is not None:
            out = attend(q, k, v)
        else:
            out = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=cache is None,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )
        return self.o_proj(out.transpose(1, 2).reshape(batch, num_tokens, -1))


class FeedForward(nn.Module):  # type: ignore[misc]
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):  # type: ignore[misc]
    """Attention and feed-forward, each normalised before and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        layer: int,
        attend: Attend | None = None,
    ) -> Tensor:
        """[B, T, d] to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Body(nn.Module):  # type: ignore[misc]
    """The parameters that checkpoints keep under "model."."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):  # type: ignore[misc]
    """Token ids to logits. Without a cache a call has no side effects, as training needs it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        before_layer: Callable[[], None] | None = None,
    ) -> Tensor:
        """Logits of the token after each one: `logits(hidden(...))`.

        Args:
            tokens: int64 [B, T]. positions, cache, before_layer: see `hidden`.

        Returns:
            [B, T, V] in the parameters' dtype.
        """
        return self.logits(self.hidden(tokens, positions, cache, before_layer))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        before_layer: Callable[[], None] | None = None,
        attend: Attend | None = None,
        rotations: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states, normalised: what the output head reads.

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T] or [T]; None counts on from the cache's length, or from 0.
            cache: tokens attend to what it holds and are appended to it; None attends within
                `tokens` only.
            before_layer: called before each layer. What it raises ends the call, and the cache
                then holds what it held before.
            attend: computes attention instead of plain causal attention, for masks of other
                shapes (documents of a training row, padded batches).
            rotations: what `rotations` gives for the positions, where the caller has it at hand.

        Returns:
            [B, T, d] in the parameters' dtype.
        """
        start = 0 if cache is None else cache.length
        if cache is not None and start + tokens.shape[1] > cache.max_seq_len:
            raise ValueError(f"{start + tokens.shape[1]} tokens in a cache of {cache.max_seq_len}")
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.model.embed_tokens(tokens)
        cos, sin = rotations or self.rotations(positions, x)
        for index, layer in enumerate(self.model.layers):
            if before_layer is not None:
                before_layer()
            x = layer(x, cos, sin, cache, index, attend)
        if cache is not None:
            cache.length = start + tokens.shape[1]
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] final hidden states to [..., V] logits."""
        tied = self.config.tie_embeddings
        head = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return functional.linear(hidden, head)

    def rotations(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of each token's rotations, [B or 1, 1, T, D / 2], like `like` otherwise.

        Args:
            positions: int64 [B, T] or [T].
            like: gives dtype and device.
        """
        frequencies, scale = rope_frequencies(self.config.rope, self.config.head_dim)
        angles = positions.to(like.device).float()[..., None] * frequencies.to(like.device)
        if angles.dim() == 2:
            angles = angles[None]
        angles = angles[:, None]
        return (angles.cos() * scale).to(like.dtype), (angles.sin() * scale).to(like.dtype)


def load_decoder(
    config: ModelConfig,
    read: Callable[[str], npt.NDArray[np.float32]],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder with the weights of a checkpoint, in evaluation mode and without gradients.

    Args:
        config: its shape.
        read: gives a tensor by its Hugging Face name as float32; called once for each.
        dtype: of the parameters.
        device: where they go.

    Raises:
        CheckpointError: a tensor's shape differs from what `config` asks. What `read` raises.
    """
    with torch.device("meta"):
        model = Decoder(config)
    state: dict[str, Any] = {}
    for name, parameter in model.state_dict().items():
        array = read(name)
        if tuple(array.shape) != tuple(parameter.shape):
            raise CheckpointError(
                f"tensor {name} has shape {list(array.shape)}, but the model's configuration "
                f"asks for {list(parameter.shape)}: the files do not belong together"
            )
        # torch cannot share read-only memory, and the caller's array must not change with ours.
        state[name] = torch.from_numpy(np.array(array, dtype=np.float32)).to(device, dtype)
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(False)
    return model
