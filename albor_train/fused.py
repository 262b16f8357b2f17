"""The decoder with fewer, wider products: query, key and value as one, gate and up as one.

It computes what `albor_serve.model.Decoder` does. Only its parameters are laid out otherwise, so
`by_original_name` gives views of them (or of their gradients) under the names of checkpoints:
weights, gradients and optimizer state stay in the original matrices, and nothing on disk differs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from albor_serve.config import ModelConfig
from albor_serve.model import Attend, Decoder, KVCache, RMSNorm, rotate
from albor_train.fp8 import fp8_linear
from albor_train.swiglu import swiglu
from albor_train.turn import turn_heads

__all__ = ["FusedDecoder", "by_original_name"]


class _FusedAttention(nn.Module):  # type: ignore[misc]
    """`albor_serve.model.Attention` with one input product, and one norm and rotation for
    queries and keys."""

    def __init__(self, config: ModelConfig, *, own_kernels: bool) -> None:
        super().__init__()
        self.own_kernels = own_kernels and config.qk_norm
        d, head_dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.eps, self.qk_norm = head_dim, config.rms_norm_eps, config.qk_norm
        rows = sum(_attention_rows(config))
        self.qkv_proj = nn.Linear(d, rows, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * head_dim, d, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        layer: int,
        attend: Attend | None = None,
    ) -> Tensor:
        """[B, T, d] to the same shape. There can be no cache."""
        if cache is not None:
            raise ValueError(f"layer {layer}: the fused decoder is for training, without a cache")
        batch, num_tokens, _ = x.shape
        qkv = self.qkv_proj(x)
        if self.own_kernels:
            q, k, v = turn_heads(
                qkv,
                self.q_norm.weight,
                self.k_norm.weight,
                (cos, sin),
                self.num_kv_heads,
                self.eps,
            )
        else:
            q, k, v = self._turned(qkv, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if attend is not None:
            out = attend(q, k, v)
        else:
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=self.num_heads != self.num_kv_heads
            )
        return self.o_proj(out.transpose(1, 2).reshape(batch, num_tokens, -1))

    def _turned(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as [B, T, heads, D]."""
        num_turned = self.num_heads + self.num_kv_heads
        qkv = qkv.view(*qkv.shape[:2], -1, self.head_dim)
        turned, v = qkv.split((num_turned, self.num_kv_heads), dim=2)
        if self.qk_norm:
            wide = turned.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            scale = torch.cat(
                (
                    self.q_norm.weight.expand(self.num_heads, -1),
                    self.k_norm.weight.expand(self.num_kv_heads, -1),
                )
            )
            turned = scale * wide.to(qkv.dtype)
        turned = rotate(turned, cos.transpose(1, 2), sin.transpose(1, 2))
        q, k = turned.split((self.num_heads, self.num_kv_heads), dim=2)
        return q, k, v


class _FusedFeedForward(nn.Module):  # type: ignore[misc]
    """`albor_serve.model.FeedForward` with one input product."""

    def __init__(self, config: ModelConfig, *, own_kernels: bool) -> None:
        super().__init__()
        self.own_kernels = own_kernels
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to the same shape."""
        gate_up = self.gate_up_proj(x)
        if self.own_kernels:
            return self.down_proj(swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class _Fp8Linear(nn.Linear):  # type: ignore[misc]
    """A linear layer whose forward product is in eight bits."""

    @classmethod
    def like(cls, layer: nn.Linear) -> _Fp8Linear:
        """One of the same shape and the same parameters."""
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., M]."""
        out = fp8_linear(x, self.weight)
        return out if self.bias is None else out + self.bias


class FusedDecoder(Decoder):
    """The decoder for training, without a cache.

    Args:
        own_kernels: SwiGLU by `albor_train.swiglu` and heads by `albor_train.turn` instead of
            what torch.compile makes of them.
        fp8: the blocks' forward products in eight bits, see `albor_train.fp8`.
    """

    def __init__(
        self, config: ModelConfig, *, own_kernels: bool = False, fp8: bool = False
    ) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = _FusedAttention(config, own_kernels=own_kernels)
            layer.mlp = _FusedFeedForward(config, own_kernels=own_kernels)
            if fp8:
                for part in (layer.self_attn, layer.mlp):
                    for name, product in part.named_children():
                        if isinstance(product, nn.Linear):
                            setattr(part, name, _Fp8Linear.like(product))


def by_original_name(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Views of tensors under the names of `Decoder`'s parameters.

    Args:
        tensors: by parameter name, of `FusedDecoder`'s shapes or of `Decoder`'s.
        config: of the decoder.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".qkv_proj." in name:
            parts = tensor.split(_attention_rows(config))
            for part, view in zip("qkv", parts, strict=True):
                found[name.replace(".qkv_proj.", f".{part}_proj.")] = view
        elif ".gate_up_proj." in name:
            for part, view in zip(("gate", "up"), tensor.chunk(2), strict=True):
                found[name.replace(".gate_up_proj.", f".{part}_proj.")] = view
        else:
            found[name] = tensor
    return found


def _attention_rows(config: ModelConfig) -> list[int]:
    """Rows of the query, key and value matrices."""
    rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [rows, kv_rows, kv_rows]
