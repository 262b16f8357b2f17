"""SwiGLU with its own kernels: six passes over memory for the backward pass become five.

torch.compile computes silu(gate) * up once more in the backward pass, because it counts what is
cheap to compute as not worth keeping. But the product after it needs that tensor written out, so it
is written twice. An operator that the compiler can't look into is not computed again.

Source: Shazeer 2020 ("GLU Variants Improve Transformer").
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["swiglu"]

_BLOCK: Final = 1024


@torch.library.custom_op("albor::swiglu", mutates_args=())  # type: ignore[untyped-decorator]
def _swiglu(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    if not gate_up.is_cuda:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
    from albor_train import kernels

    gate_up = gate_up.contiguous()
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    grid = (out.numel() // width, -(-width // _BLOCK))
    kernels.swiglu_forward[grid](gate_up, out, width, _BLOCK)
    return out


@_swiglu.register_fake  # type: ignore[untyped-decorator]
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("albor::swiglu_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _swiglu_backward(gate_up: Tensor, gradient: Tensor) -> Tensor:
    width = gradient.shape[-1]
    if not gate_up.is_cuda:
        gate, up = (part.float() for part in gate_up.chunk(2, dim=-1))
        wanted, share = gradient.float(), torch.sigmoid(gate)
        act = gate * share
        for_gate = wanted * up * (share + act * (1 - share))
        return torch.cat((for_gate, wanted * act), dim=-1).to(gate_up.dtype)
    from albor_train import kernels

    gate_up, gradient = gate_up.contiguous(), gradient.contiguous()
    out = torch.empty_like(gate_up)
    grid = (gradient.numel() // width, -(-width // _BLOCK))
    kernels.swiglu_backward[grid](gate_up, gradient, out, width, _BLOCK)
    return out


@_swiglu_backward.register_fake  # type: ignore[untyped-decorator]
def _(gate_up: Tensor, _gradient: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, gradient: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    out: Tensor = torch.ops.albor.swiglu_backward(gate_up, gradient)
    return out


_swiglu.register_autograd(_gradient, setup_context=_keep)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with gradients.

    Args:
        gate_up: [..., 2 F]: the gate's channels, then up's.

    Returns:
        [..., F] in the same dtype.
    """
    out: Tensor = torch.ops.albor.swiglu(gate_up)
    return out
