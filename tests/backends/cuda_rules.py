"""What the GPU backend promises, beside the plain torch model; raises where it is not kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from albor_serve.backends.base import Aborted, ExtendStep
from albor_serve.backends.cuda import CudaBackend
from albor_serve.backends.torch_ref import TorchReferenceBackend
from albor_serve.config import DevicePlan, ModelConfig, SamplingParams
from albor_serve.errors import BackendError
from albor_serve.kernels.synthetic import RandomModel


def check(device: str) -> None:
    """Every rule once, on a model of one layer."""
    config = ModelConfig("qwen3", 64, 128, 128, 1, 2, 1, 64, 64, qk_norm=True, tie_embeddings=True)
    model = RandomModel(config)
    ours = CudaBackend(config, model.q4_rows, model.read, 2, 40, device=device)
    plain = TorchReferenceBackend(config, model.read, 2, 40)
    rng = np.random.default_rng(0)

    def both(slot: int, count: int, rows: Any = "all") -> None:
        step = ExtendStep(slot, [int(t) for t in rng.integers(0, 64, count)], rows)
        got, want = ours.extend([step])[0].copy(), plain.extend([step])[0]
        assert got.shape == want.shape
        assert not got.size or np.abs(got - want).max() < 0.02, (count, np.abs(got - want).max())

    ours._check()
    both(0, 12)  # a prompt whose rows are all wanted, through torch
    both(0, 1)  # a token, through the kernels
    both(0, 3)  # drafts, padded to four
    both(1, 2, "last")  # another slot
    if device == "cpu":
        ours._most_by_kernels = 11
    for backend in (ours, plain):
        backend.rewind(1, 0)
    both(1, 21, "last")  # a prompt, in a piece of the prefill's
    both(1, 13, "none")
    for backend in (ours, plain):
        backend.rewind(1, 0)
    both(1, 11)  # what was typed, eight tokens and three through the kernels
    both(1, 9, "last")
    for backend in (ours, plain):
        backend.rewind(1, 2)
    both(0, 1, "none")
    for backend in (ours, plain):
        backend.rewind(0, 5)
    both(0, 2)
    for backend in (ours, plain):
        backend.fork(0, 1, 4)
    both(1, 1)
    both(0, 1)
    ours.abort.set()
    with pytest.raises(Aborted):
        ours.extend([ExtendStep(0, [1])])
    ours.abort.clear()
    both(0, 1)
    _check_decoding(ours, plain)
    both(0, 1)
    both(0, 40 - ours.length(0) - 1)
    both(0, 1)  # the last position
    with pytest.raises(BackendError):
        ours.extend([ExtendStep(0, [1])])
    ours.close()
    ours.close()
    with pytest.raises(BackendError, match="closed"):
        ours.length(0)


def _check_decoding(ours: CudaBackend, plain: TorchReferenceBackend) -> None:
    """Tokens decoded on the device are the reference's best ones, or as good as."""
    plan = DevicePlan(SamplingParams(temperature=0.0), 4)
    for limit in (4, 2):  # the second time the host has enough after two
        got: list[int] = []
        before, token = ours.length(0), 7

        def on_token(new: int, got: list[int] = got, limit: int = limit) -> bool:
            got.append(new)
            return len(got) < limit

        assert ours.decode(0, token, plan, on_token) == got
        assert len(got) == limit
        assert ours.length(0) == before + limit
        for new in got:
            row = plain.extend([ExtendStep(0, [token])])[0][0]
            assert row[new] > row.max() - 0.04, (new, row.argmax())
            token = new
