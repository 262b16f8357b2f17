from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from albor_train.bench import bench
from albor_train.fp8 import fp8_linear
from albor_train.spec import load_spec
from tests.train.fixtures_train import write_tiny_spec


def test_a_product_is_right_to_eight_bits_and_its_gradients_are_plain() -> None:
    torch.manual_seed(0)
    # Rows of very different size: each has its own scale.
    inputs = (torch.randn(2, 5, 64) * torch.logspace(-3, 3, 5)[:, None]).requires_grad_()
    weight = torch.randn(48, 64).requires_grad_()
    weights = torch.randn(2, 5, 48)
    results = []
    for product in (functional.linear, fp8_linear):
        out = product(inputs, weight)
        gradients = torch.autograd.grad((out * weights).sum(), (inputs, weight))
        results.append((out.detach(), gradients))
    (expected, wanted), (out, gradients) = results
    error = (out - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < float(error.max()) < 0.06
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_in_eight_bits_learns_nearly_the_same(tmp_path: Path) -> None:
    spec = load_spec(write_tiny_spec(tmp_path))
    variants = ["ours:fused=on", "ours:fused=on,fp8=on,kernels=own"]
    plain, small = bench(spec, variants, device=torch.device("cpu"), steps=4)
    assert not small.problem
    assert small.digest != plain.digest
    assert small.loss == pytest.approx(plain.loss, rel=0.02)
