from __future__ import annotations

import torch

from albor_train.turn import turn_heads


def test_the_operators_keep_their_promises_to_the_compiler() -> None:
    """Values and gradients against the model's own are in the tests of the fused decoder."""
    qkv = torch.randn(2, 3, 64).requires_grad_()
    weight = torch.rand(8).requires_grad_()
    place = (torch.rand(1, 1, 3, 4), torch.rand(1, 1, 3, 4))
    inputs = (qkv, weight, weight.detach().clone().requires_grad_(), *place, 2, 1e-6)
    torch.library.opcheck(torch.ops.albor.turn_heads.default, inputs)
    parts = turn_heads(qkv, weight, weight, place, 2, 1e-6)
    assert [part.shape for part in parts] == [(2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8)]
    plain = [tensor.detach() for tensor in (qkv, weight, weight.clone(), *place, *parts)]
    torch.library.opcheck(torch.ops.albor.turn_heads_backward.default, (*plain, 1e-6))
