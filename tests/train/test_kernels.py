"""The Triton kernels of training, interpreted, against what their operators compute on a CPU."""

from __future__ import annotations

import pytest

from tests.scripts import run_script

pytest.importorskip("triton")

# 1,100 columns end within a block of SwiGLU. Eight heads fill their block and 11 don't; three
# tokens end within one too, and ten are shared unevenly by three programs.
KERNELS = """
import torch
from albor_train import kernels, swiglu, turn

torch.manual_seed(0)
for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
    for width in (64, 1100):
        gate_up = torch.randn(3, 2, 2 * width, dtype=dtype)
        gradient = torch.randn(3, 2, width, dtype=dtype)
        out, for_inputs = torch.empty_like(gradient), torch.empty_like(gate_up)
        grid = (6, -(-width // swiglu._BLOCK))
        kernels.swiglu_forward[grid](gate_up, out, width, swiglu._BLOCK)
        kernels.swiglu_backward[grid](gate_up, gradient, for_inputs, width, swiglu._BLOCK)
        torch.testing.assert_close(out, swiglu.swiglu(gate_up), rtol=limit, atol=limit)
        expected = torch.ops.albor.swiglu_backward(gate_up, gradient)
        torch.testing.assert_close(for_inputs, expected, rtol=limit, atol=limit)

for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    for batch, length, heads, kv_heads, size in ((2, 5, 4, 2, 16), (1, 3, 5, 3, 8)):
        qkv = torch.randn(batch, length, (heads + 2 * kv_heads) * size, dtype=dtype)
        weights = [torch.rand(size).to(dtype) for _ in range(2)]
        angles = torch.randn(1, 1, length, size // 2)
        place = [angles.cos().to(dtype), angles.sin().to(dtype)]
        inputs = [qkv, *weights, *place]
        expected = torch.ops.albor.turn_heads(*inputs, kv_heads, 1e-6)
        found = turn._new_heads(qkv, heads, kv_heads, size)
        sizes = turn._sizes(heads, kv_heads, size)
        tokens = batch * length
        sizes["block"] = 2
        blocks = -(-tokens // sizes["block"])
        kernels.turn_forward[(blocks,)](*inputs, *found, tokens, length, 1e-6, **sizes)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=limit, atol=limit)
        gradients = [torch.randn_like(part) for part in expected]
        wanted, wanted_sums = torch.ops.albor.turn_heads_backward(*inputs, *gradients, 1e-6)
        out, sums = torch.empty_like(qkv), torch.empty(3, 2, size)
        kernels.turn_backward[(3,)](
            *inputs, *gradients, out, sums, tokens, length, 1e-6, -(-blocks // 3), **sizes
        )
        torch.testing.assert_close(out, wanted, rtol=limit, atol=limit)
        torch.testing.assert_close(sums.sum(0), wanted_sums, rtol=1e-4, atol=1e-4)
"""


def test_kernels_compute_what_torch_computes() -> None:
    run_script(KERNELS)
