"""Products in eight bits, forward only.

Rows of the input and rows of the weights are scaled to the range of float8 e4m3 each (the row-wise
scheme of Micikevicius et al. 2022 and torch._scaled_mm); both products of the backward pass stay in
the compute dtype. An experiment for speed: weights, gradients and checkpoints are as without.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["fp8_linear"]

_LARGEST: Final = 448.0
"""Of float8 e4m3."""


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] as float8 e4m3, and what they were divided by, float32 [N, 1]."""
    wide = rows.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / _LARGEST
    return (wide / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale


class _Fp8Linear(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        small, scale = _rounded(rows)
        small_weight, weight_scale = _rounded(weight)
        if rows.is_cuda:
            out: Tensor = torch._scaled_mm(
                small,
                small_weight.t(),
                scale_a=scale,
                scale_b=weight_scale.t(),
                out_dtype=rows.dtype,
                use_fast_accum=True,
            )
            return out
        product = functional.linear(small.float(), small_weight.float())
        return (product * scale * weight_scale.t()).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ weight, gradient.t() @ rows


def fp8_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """Inputs [..., K] times weight [M, K] transposed, [..., M], in inputs' dtype.

    On a CPU the same rounding is emulated. On CUDA, K and M are multiples of 16.
    """
    out: Tensor = _Fp8Linear.apply(inputs.flatten(0, -2), weight)
    return out.view(*inputs.shape[:-1], -1)
