"""What stands for the kernels' own product in interpreted tests gives the same."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.scripts import run_script

_SCRIPT = """
import numpy as np
import torch
from tests.kernels.interpreted import mma_product, twin_kernel

rng = np.random.default_rng(0)
W = 2
weights = rng.integers(-(1 << 31), 1 << 31, (2, W * 128)).astype(np.int32)
halves = rng.normal(size=(5, W * 128, 2)).astype(np.float16).view(np.int32)[..., 0]
scales, x = halves[0], halves[1:]
out = torch.ones(W * 128)
arrays = (weights[0], weights[1], scales, x)
twin_kernel[(1,)](*(torch.from_numpy(a.copy()) for a in arrays), out, W=W)
want = 1 + mma_product(weights[0], weights[1], scales, list(x), W)
assert np.abs(want).max() > 100
assert np.abs(out.numpy() - want).max() < 1e-5 * np.abs(want).max()
"""


def test_the_product_by_numpy_is_the_one_that_the_kernels_write_out() -> None:
    run_script(_SCRIPT)
