"""From one product of queries, keys and values to what attention reads, each way in one pass.

Queries and keys are normalised for each head and turned by their positions (Qwen3: RMS norm, then
rotary positions), values are copied. torch.compile makes two passes of the forward direction and
three of the backward one, a third of them for the gradient of the norms' weights.

Letters: B rows, T tokens, H query heads, K key heads, D head size, R = (H + 2 K) D.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from albor_serve.model import rotate

__all__ = ["turn_heads"]

_TILE: Final = 2048
"""Numbers that a program has at one time: so many fit into its registers twice over."""
_MOST_PROGRAMS: Final = 2048


def _heads_of(qkv: Tensor, q_weight: Tensor, kv_heads: int) -> int:
    """Number of query heads."""
    return int(qkv.shape[-1]) // int(q_weight.shape[0]) - 2 * kv_heads


def _sizes(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    padded = 1 << (heads + kv_heads - 1).bit_length()
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "half": head_dim // 2,
        "block": max(1, _TILE // (padded * head_dim)),
        "padded": padded,
        "padded_kv": 1 << (kv_heads - 1).bit_length(),
    }


def _new_heads(qkv: Tensor, heads: int, kv_heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _ = qkv.shape
    k, v = (qkv.new_empty((batch, length, kv_heads, size)) for _ in range(2))
    return qkv.new_empty((batch, length, heads, size)), k, v


@torch.library.custom_op("albor::turn_heads", mutates_args=())  # type: ignore[untyped-decorator]
def _turn(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, size = _heads_of(qkv, q_weight, kv_heads), q_weight.shape[0]
    batch, length, _ = qkv.shape
    if qkv.is_cuda:
        from albor_train import kernels

        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        q, k, v = _new_heads(qkv, heads, kv_heads, size)
        sizes = _sizes(heads, kv_heads, size)
        kernels.turn_forward[(-(-batch * length // sizes["block"]),)](
            qkv, q_weight, k_weight, cos, sin, q, k, v, batch * length, length, eps,
            **sizes,
        )  # fmt: skip
        return q, k, v
    parts = qkv.view(batch, length, -1, size).float().split((heads, kv_heads, kv_heads), dim=2)
    found = []
    for part, weight in zip(parts, (q_weight, k_weight), strict=False):
        part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + eps) * weight.float()
        place = (cos.view(1, length, 1, -1).float(), sin.view(1, length, 1, -1).float())
        found.append(rotate(part, *place).to(qkv.dtype).contiguous())
    return found[0], found[1], parts[2].to(qkv.dtype, copy=True).contiguous()


@_turn.register_fake  # type: ignore[untyped-decorator]
def _(
    qkv: Tensor,
    q_weight: Tensor,
    _k_weight: Tensor,
    _cos: Tensor,
    _sin: Tensor,
    kv_heads: int,
    _eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_heads(qkv, _heads_of(qkv, q_weight, kv_heads), kv_heads, q_weight.shape[0])


@torch.library.custom_op("albor::turn_heads_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _turn_gradients(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    for_q: Tensor,
    for_k: Tensor,
    for_v: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, size = for_q.shape
    kv_heads = for_k.shape[2]
    if qkv.is_cuda:
        from albor_train import kernels

        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        for_q, for_k, for_v = for_q.contiguous(), for_k.contiguous(), for_v.contiguous()
        out = torch.empty_like(qkv)
        sizes = _sizes(heads, kv_heads, size)
        blocks = -(-batch * length // sizes["block"])
        programs = min(_MOST_PROGRAMS, blocks)
        sums = torch.empty((programs, 2, size), dtype=torch.float32, device=qkv.device)
        kernels.turn_backward[(programs,)](
            qkv, q_weight, k_weight, cos, sin, for_q, for_k, for_v, out, sums,
            batch * length, length, eps, -(-blocks // programs), **sizes,
        )  # fmt: skip
        return out, sums.sum(0)
    parts = qkv.view(batch, length, -1, size).float().split((heads, kv_heads, kv_heads), dim=2)
    place = (cos.view(1, length, 1, -1).float(), -sin.view(1, length, 1, -1).float())
    found, sums = [], torch.empty((2, size), dtype=torch.float32)
    for number, (gradient, weight) in enumerate(((for_q, q_weight), (for_k, k_weight))):
        scale = torch.rsqrt(parts[number].square().mean(-1, keepdim=True) + eps)
        plain = parts[number] * scale
        back = rotate(gradient.float(), *place)
        sums[number] = (back * plain).sum((0, 1, 2))
        back = back * weight.float()
        found.append(scale * (back - plain * (back * plain).mean(-1, keepdim=True)))
    return torch.cat((*found, for_v.float()), dim=2).view(qkv.shape).to(qkv.dtype), sums


@_turn_gradients.register_fake  # type: ignore[untyped-decorator]
def _(
    qkv: Tensor,
    q_weight: Tensor,
    *_rest: Any,
) -> tuple[Tensor, Tensor]:
    sums = qkv.new_empty((2, q_weight.shape[0]), dtype=torch.float32)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, _kv_heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, for_q: Tensor, for_k: Tensor, for_v: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    for_qkv, sums = torch.ops.albor.turn_heads_backward(
        qkv, q_weight, k_weight, cos, sin, for_q, for_k, for_v, ctx.eps
    )
    for_weights = sums.to(q_weight.dtype)
    return for_qkv, for_weights[0], for_weights[1], None, None, None, None


_turn.register_autograd(_gradients, setup_context=_keep)


def turn_heads(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotations: tuple[Tensor, Tensor],
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised and turned queries and keys, and values; with gradients but for the rotations.

    Computed in float32 and rounded once.

    Args:
        qkv: [B, T, R]: heads of queries, of keys, of values.
        q_weight, k_weight: [D], of the norms.
        rotations: cos and sin of T x D / 2, the same for every row; with more axes of size 1.
        kv_heads: K.
        eps: of the norms.

    Returns:
        q [B, T, H, D], k and v [B, T, K, D], of qkv's dtype.
    """
    cos, sin = rotations
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.albor.turn_heads(
        qkv, q_weight, k_weight, cos, sin, kv_heads, eps
    )
    return out
