"""Attention that stays within documents, for rows that hold several.

The kinds compute the same; which is fastest depends on the device.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from albor_serve.model import Attend
from albor_train.errors import TrainingError
from albor_train.spec import AttentionKind, SdpaBackend

__all__ = ["attention_for", "document_ids", "prepare_mask", "sdpa_by"]


def document_ids(tokens: Tensor, end_id: int, pad_id: int) -> Tensor:
    """Number of each token's document within its row, int32 [B, T]; padding counts as one more.

    A document ends with `end_id`, which belongs to it.
    """
    ends = (tokens == end_id).int()
    numbers = ends.cumsum(dim=1, dtype=torch.int32) - ends
    # `end_id` before padding has closed the last document; the padding is then its own.
    return torch.where(tokens == pad_id, numbers + (tokens == pad_id).int(), numbers).int()


def prepare_mask(kind: AttentionKind, documents: Tensor, device: torch.device) -> Any:
    """What `attention_for` needs of one batch. Made outside a compiled function.

    Args:
        documents: int32 [B, T] from `document_ids`, on the CPU, so that no step waits for the GPU.
        device: where attention runs.

    Raises:
        TrainingError: this torch or device can't do `kind`.
    """
    batch, length = documents.shape
    if kind == "causal":
        return None
    if kind == "document_varlen":
        return _segment_bounds(documents, device)
    documents = documents.to(device, non_blocking=True)
    if kind == "document_mask":
        same = documents[:, :, None] == documents[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
        return (same & causal)[:, None]

    def visible(b: Tensor, _h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (row >= col) & (documents[b, row] == documents[b, col])

    return flex_attention.create_block_mask(
        visible, batch, None, length, length, device=documents.device
    )


def _segment_bounds(documents: Tensor, device: torch.device) -> Tensor:
    """Starts of the documents in the flattened batch, int32 [S + 1], for varlen_attn."""
    if device.type != "cuda":
        raise TrainingError(
            "train.attention document_varlen needs a CUDA device: take document_mask on a CPU"
        )
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = torch.nonzero(first.flatten()).squeeze(1).int()
    # Few different lengths, so that few graphs are compiled; unused segments are empty.
    size = max(64, 1 << len(starts).bit_length())
    bounds = torch.full((size + 1,), documents.numel(), dtype=torch.int32)
    bounds[: len(starts)] = starts
    return bounds.pin_memory().to(device, non_blocking=True)


def attention_for(kind: AttentionKind, mask: Any) -> Attend | None:
    """The attention of one batch, or None for plain causal attention.

    Args:
        mask: from `prepare_mask`. A compiled function takes it as an argument and calls this
            inside, so that the next batch's mask needs no new graph.
    """
    if kind == "causal":
        return None
    if kind == "document_varlen":
        return _varlen(mask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = q.shape[1] != k.shape[1]
        if kind == "document_mask":
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=shared
            )
        out: Tensor = flex_attention.flex_attention(q, k, v, block_mask=mask, enable_gqa=shared)
        return out

    return attend


def sdpa_by(
    backend: SdpaBackend, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """While this context is open, a library computes `scaled_dot_product_attention`.

    A function is compiled for the library of its first call.

    Raises:
        TrainingError: the device lacks it.
    """
    if backend == "any":
        return contextlib.nullcontext()
    if backend == "cudnn" and device.type != "cuda":
        raise TrainingError("train.sdpa cudnn needs a CUDA device: take any on a CPU")
    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    context: contextlib.AbstractContextManager[object] = sdpa_kernel(kinds[backend])
    return context


def _varlen(bounds: Tensor) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    # torch's releases spell causality differently, and only the newer ones share key heads.
    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True}
    if "is_causal" not in names:
        options = {"window_size": (-1, 0)}
    shares_heads = "enable_gqa" in names
    if shares_heads:
        options["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        groups = 1 if shares_heads else heads // k.shape[1]

        def flat(x: Tensor, repeat: int) -> Tensor:
            x = x.repeat_interleave(repeat, dim=1) if repeat > 1 else x
            return x.transpose(1, 2).reshape(batch * length, x.shape[1], x.shape[-1])

        out: Tensor = varlen_attn(
            flat(q, 1), flat(k, groups), flat(v, groups), bounds, bounds, length, length, **options
        )
        return out.view(batch, length, heads, -1).transpose(1, 2)

    return attend
