from __future__ import annotations

import torch
from torch.nn import functional

from albor_train.swiglu import swiglu
from tests.scripts import run_script

# What the kernels store against what torch computes; 1,500 columns end within a block.
KERNELS = """
import torch
from albor_train import swiglu

torch.manual_seed(0)
for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
    for width in (64, 1500):
        gate_up = torch.randn(3, 2, 2 * width, dtype=dtype)
        gradient = torch.randn(3, 2, width, dtype=dtype)
        out, for_inputs = torch.empty_like(gradient), torch.empty_like(gate_up)
        grid = (6, -(-width // swiglu._BLOCK))
        swiglu._swiglu_forward[grid](gate_up, out, width, swiglu._BLOCK)
        swiglu._swiglu_backward_rows[grid](gate_up, gradient, for_inputs, width, swiglu._BLOCK)
        torch.testing.assert_close(out, swiglu.swiglu(gate_up), rtol=limit, atol=limit)
        expected = torch.ops.albor.swiglu_backward(gate_up, gradient)
        torch.testing.assert_close(for_inputs, expected, rtol=limit, atol=limit)
"""


def test_kernels_compute_what_torch_computes() -> None:
    run_script(KERNELS)


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
