from __future__ import annotations

import torch

from albor_train.turn import turn_heads
from tests.scripts import run_script

# What the kernels store against what torch computes. Six heads and two end within a padded block;
# of three tokens, or of ten for three programs, so do the tokens.
KERNELS = """
import torch
from albor_train import turn

torch.manual_seed(0)
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
        turn._turn_forward[(blocks,)](*inputs, *found, tokens, length, 1e-6, **sizes)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=limit, atol=limit)
        gradients = [torch.randn_like(part) for part in expected]
        wanted, wanted_sums = torch.ops.albor.turn_heads_backward(*inputs, *gradients, 1e-6)
        out, sums = torch.empty_like(qkv), torch.empty(3, 2, size)
        turn._turn_backward[(3,)](
            *inputs, *gradients, out, sums, tokens, length, 1e-6, -(-blocks // 3), **sizes
        )
        torch.testing.assert_close(out, wanted, rtol=limit, atol=limit)
        torch.testing.assert_close(sums.sum(0), wanted_sums, rtol=1e-4, atol=1e-4)
"""


def test_kernels_compute_what_torch_computes() -> None:
    run_script(KERNELS)


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
