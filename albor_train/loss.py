"""Cross-entropy without ever holding all logits.

A batch of 32,768 tokens over a vocabulary of 16,384 would be 2 GB of logits in float32. They are
made, used and dropped chunk by chunk, and the gradient is taken in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["IGNORED", "ChunkLoss", "chunk_loss", "chunked_cross_entropy"]

IGNORED: Final = -100
"""Target of positions that are not predicted."""


ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [N, V], targets [N]) to (sum of losses in float32, its gradient in logits' dtype)."""


def chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one chunk; compiled, it reads the logits twice and no more."""
    counts = targets != IGNORED
    wide = logits.float()
    log_norm = torch.logsumexp(wide, dim=-1, keepdim=True)
    columns = torch.arange(logits.shape[1], device=logits.device)
    is_target = columns[None, :] == targets[:, None]
    losses = log_norm.squeeze(1) - torch.where(is_target, wide, 0.0).sum(-1)
    gradient = (torch.exp(wide - log_norm) - is_target.float()) * counts[:, None]
    return torch.where(counts, losses, 0.0).sum(), gradient.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Sum of cross-entropies; gradients are computed in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        chunk_len: int,
        per_chunk: ChunkLoss,
    ) -> Tensor:
        needs_grad = hidden.requires_grad or head.requires_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if needs_grad else None
        for start in range(0, len(hidden), chunk_len):
            rows = hidden[start : start + chunk_len]
            loss, gradient = per_chunk(rows @ head.T, targets[start : start + chunk_len])
            total += loss
            if hidden_grad is not None and head_grad is not None:
                hidden_grad[start : start + chunk_len] = gradient @ head
                head_grad += gradient.T @ rows
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = grads[0]
        for_hidden = hidden_grad * scale.to(hidden_grad.dtype)
        return for_hidden, (head_grad * scale).to(ctx.head_dtype), None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    chunk_len: int,
    per_chunk: ChunkLoss = chunk_loss,
) -> Tensor:
    """Sum of -log p(target) in nats, float32 [].

    Args:
        hidden: [N, d] final hidden states. head: [V, d] output matrix, of the same dtype.
        targets: int64 [N]; IGNORED ones count nothing.
        chunk_len: rows of logits that exist at one time.
        per_chunk: `chunk_loss`, or that function compiled.
    """
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, head, targets, chunk_len, per_chunk)
    return total
