from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from albor_train.loss import IGNORED, chunked_cross_entropy


@pytest.mark.parametrize("chunk_len", [1, 7, 32, 100])
def test_loss_and_gradients_are_torchs(chunk_len: int) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (32,))
    targets[::5] = IGNORED
    start = torch.randn(32, 16), torch.randn(50, 16)
    results = []
    for ours in (True, False):
        hidden, head = (tensor.clone().requires_grad_() for tensor in start)
        if ours:
            loss = chunked_cross_entropy(hidden, head, targets, chunk_len)
        else:
            loss = functional.cross_entropy(
                hidden @ head.T, targets, ignore_index=IGNORED, reduction="sum"
            )
        (loss * 0.3).backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_no_gradient_no_buffers() -> None:
    hidden, head = torch.randn(8, 4), torch.randn(10, 4)
    loss = chunked_cross_entropy(hidden, head, torch.zeros(8, dtype=torch.int64), 4)
    assert not loss.requires_grad
