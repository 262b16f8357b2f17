from __future__ import annotations

import torch
from torch.nn import functional

from albor_train.swiglu import swiglu


def test_values_and_gradients_are_those_of_torch() -> None:
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.linspace(-1, 1, 32)
    gate, up = inputs.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    (expected * weights).sum().backward()
    wanted, inputs.grad = inputs.grad, None
    out = swiglu(inputs)
    (out * weights).sum().backward()
    assert torch.equal(out, expected)
    torch.testing.assert_close(inputs.grad, wanted)


def test_the_operators_keep_their_promises_to_the_compiler() -> None:
    inputs = torch.randn(2, 8).requires_grad_()
    torch.library.opcheck(torch.ops.albor.swiglu.default, (inputs,))
    torch.library.opcheck(
        torch.ops.albor.swiglu_backward.default,
        (inputs.detach(), inputs.detach()[:, :4].contiguous()),
    )
