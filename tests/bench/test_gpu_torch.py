"""The compiled torch peer computes the model that it is said to; its 4 bits are near."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from albor_serve.bench.gpu import GpuJob  # noqa: E402
from albor_serve.bench.gpu_albor import measure_backend  # noqa: E402
from albor_serve.bench.gpu_rows import GpuRow  # noqa: E402
from albor_serve.bench.gpu_timing import attempt, host_us  # noqa: E402
from albor_serve.bench.gpu_torch import GROUP, PlainLoop, int4_groups  # noqa: E402
from albor_serve.config import ModelConfig  # noqa: E402
from tests.test_engine_device import DeviceBackend  # noqa: E402


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_loop_equals_the_decoder(qk_norm: bool) -> None:
    config = ModelConfig(
        "qwen3", 96, 64, 128, 2, 4, 2, 16, 64, qk_norm=qk_norm, tie_embeddings=qk_norm
    )
    torch.manual_seed(0)
    with torch.inference_mode():
        loop = PlainLoop(config, 32, torch.float32, "cpu", int4=False)
        tokens = [int(loop.token)]
        for _ in range(9):
            loop.step()
            tokens.append(int(loop.token))
        want = loop.decoder(torch.tensor([tokens[:-1]]))[0].argmax(-1)
        last = loop.decoder(torch.tensor([tokens]))[0, -1]
        assert torch.allclose(loop.logits()[0, 0], last, atol=1e-4)
    assert want.tolist() == tokens[1:]
    assert len(set(tokens)) > 2
    assert int(loop.position) == 9


def test_4_bit_groups_are_as_near_as_16_steps_allow() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    codes, scales, offsets = int4_groups(weight)
    assert codes.min() >= 0
    assert codes.max() <= 15
    groups = codes.reshape(8, -1, GROUP).float()
    back = ((groups - 8) * scales[..., None] + offsets[..., None]).reshape(8, 128)
    step = scales.repeat_interleave(GROUP, dim=1)
    assert ((back - weight).abs() <= step / 2 + 1e-6).all()


def test_a_row_that_fails_is_a_row_that_says_why() -> None:
    rows: list[GpuRow] = []

    def broken() -> GpuRow:
        raise RuntimeError("no\nmemory")

    attempt(rows.append, broken, GpuRow("torch-bf16", "token", 128))
    assert rows == [GpuRow("torch-bf16", "token", 128, note="RuntimeError: no memory")]


def test_times_are_of_the_run_alone() -> None:
    calls: list[str] = []
    us = host_us(lambda: calls.append("run"), 4, lambda: calls.append("before"))
    assert us > 0
    assert calls == ["before", "run"] * 7


def test_the_backend_is_measured_at_the_lengths_that_rows_name() -> None:
    backend = DeviceBackend(64, num_slots=2, max_seq_len=640)
    rows: list[GpuRow] = []
    job = GpuJob("33m", None, (16, 40), (1, 2), (1, 4), (16, 700), repeats=1)
    measure_backend(job, backend, rows.append)  # type: ignore[arg-type]
    failed = [row for row in rows if row.us is None]
    assert [row.rows for row in failed] == [700]
    assert "BackendError: the slot is full" in failed[0].note
    told = [(row.context, row.batch, row.rows) for row in rows if row.us is not None]
    tokens, extends = [(16, 1, 1), (40, 1, 1)], [(16, 1, 1), (16, 1, 4), (16, 1, 1), (16, 2, 1)]
    assert told == [(480, 1, 32), *tokens, (0, 1, 16), *extends]
    assert rows[1].read_bytes == 1 + 16  # the fake's weights and cache, a byte each
    assert backend.plans[0].max_new_tokens == 32
