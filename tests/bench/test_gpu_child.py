"""A child of albor-bench gpu, with fakes where it would need a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from albor_serve.bench import gpu_albor, gpu_child, gpu_torch, shapes  # noqa: E402
from albor_serve.bench.gpu import GpuJob  # noqa: E402
from albor_serve.bench.gpu_rows import GpuRow  # noqa: E402
from albor_serve.bench.shapes import shape_gguf  # noqa: E402
from albor_serve.config import ModelConfig  # noqa: E402
from albor_serve.errors import ConfigError  # noqa: E402
from albor_serve.kernels.synthetic import RandomModel  # noqa: E402
from tests.test_engine_device import DeviceBackend  # noqa: E402

SHAPE = ModelConfig("llama", 64, 128, 128, 1, 2, 1, 64, 64, tie_embeddings=True)


class _Decoder:
    """Notes the steps of its graphs, each of which "takes" a microsecond a row."""

    log: list[tuple[int, int]] = []  # noqa: RUF012 - emptied by each test
    fail = False

    def __init__(self, weights: object, room: int) -> None:
        self.position = torch.zeros(1, dtype=torch.int32)

    def capture(self, plan: Any, *, num_steps: int = 1, **_: bool) -> Any:
        if plan.num_tokens == 2 and self.fail:
            raise RuntimeError("no kernel\nof two")

        class Graph:
            @staticmethod
            def replay() -> None:
                self.log.append((int(self.position), num_steps * plan.num_tokens))

        return Graph


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(gpu_albor, "GpuDecoder", _Decoder)
    _Decoder.log.clear()

    def device_us(run: Callable[[], None], repeats: int, before: Callable[[], None]) -> float:
        before()
        start = len(_Decoder.log)
        run()
        return float(sum(rows for _, rows in _Decoder.log[start:]))

    monkeypatch.setattr(gpu_albor, "device_us", device_us)


def _backend(*_: object) -> DeviceBackend:
    backend = DeviceBackend(64, num_slots=2, max_seq_len=700)
    backend.decode_weights = RandomModel(SHAPE).pack("cpu", 64)  # type: ignore[attr-defined]
    return backend


def test_kernels_and_backend_are_measured_row_by_row(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_albor, "CudaBackend", _backend)
    monkeypatch.setattr(gpu_child, "SHAPES", {"33m": SHAPE})
    rows: list[GpuRow] = []
    job = GpuJob("33m", None, (16, 512), (1, 2), (1, 2, 20), (16,), repeats=1)
    gpu_albor.measure_albor(job, rows.append)
    graphs = [row for row in rows if "graph" in row.what]
    told = [(row.what, row.context, row.batch, row.rows, row.us, row.note) for row in graphs]
    assert told == [
        # A microsecond a row: eight tokens of one graph count as one.
        ("token, graph", 16, 1, 1, 1.0, ""),
        ("token, graph", 512, 1, 1, 1.0, ""),
        ("verify, graph", 512, 1, 1, 1.0, ""),
        ("verify, graph", 512, 1, 2, 2.0, ""),
        ("verify, graph", 512, 1, 20, 24.0, "3 steps of 8"),
        ("step of all slots, graphs", 512, 1, 1, 1.0, "slots one after the other"),
        ("step of all slots, graphs", 512, 2, 1, 2.0, "slots one after the other"),
    ]
    weights = RandomModel(SHAPE).pack("cpu", 64).bytes_per_token
    kv = 2 * 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim
    assert [row.read_bytes for row in graphs] == [
        weights + tokens * kv for tokens in (16, 512, 513, 514, 532, 512, 1024)
    ]
    assert {position for position, _ in _Decoder.log} == {16, 512}
    assert rows[0].what == "start"
    assert rows[0].us is not None
    assert any(row.what == "FIM suggestion" and row.us for row in rows)
    assert all(row.engine == "albor" for row in rows)


def test_a_graph_that_fails_is_a_row_and_the_others_are_measured(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_albor, "CudaBackend", _backend)
    monkeypatch.setattr(gpu_child, "SHAPES", {"33m": SHAPE})
    monkeypatch.setattr(_Decoder, "fail", True)
    rows: list[GpuRow] = []
    gpu_albor.measure_albor(GpuJob("33m", None, (16,), (1,), (1, 2), (16,), 1), rows.append)
    [failed] = [row for row in rows if row.us is None]
    assert (failed.what, failed.rows, failed.note) == (
        "verify, graph",
        2,
        "RuntimeError: no kernel of two",
    )
    assert any(row.what.startswith("step of all") for row in rows)


def test_the_shape_has_room_for_the_longest_context(tmp_path: Path) -> None:
    job = GpuJob("33m", None, (128,), (1,), (1,), (9000,), 1)
    config = gpu_child.model_config(job)
    assert config.max_seq_len == 9000 + gpu_child.ROOM
    assert dataclasses.replace(config, max_seq_len=1) == dataclasses.replace(
        shapes.SHAPES["33m"], max_seq_len=1
    )
    path = shape_gguf("small", dataclasses.replace(SHAPE, vocab_size=300), tmp_path)
    of_file = gpu_child.model_config(dataclasses.replace(job, model=str(path)))
    assert (of_file.vocab_size, of_file.max_seq_len) == (300, 9512)


def test_rows_are_lines_of_json(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = GpuRow("albor", "token", 16, us=1.0)
    monkeypatch.setattr(gpu_albor, "measure_albor", lambda _job, put: put(row))
    text = _job_text()
    assert gpu_child.main(["albor", text]) == 0
    assert json.loads(capsys.readouterr().out) == {"row": dataclasses.asdict(row)}
    monkeypatch.setattr(gpu_child, "shape_gguf", lambda name: Path(f"/models/{name}.gguf"))
    assert gpu_child.main(["gguf", text]) == 0
    assert capsys.readouterr().out == "/models/33m.gguf\n"
    with pytest.raises(ConfigError, match="no such engine: other"):
        gpu_child.main(["other", text])


def test_a_child_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_child.main(["albor", _job_text()]) == 1
    assert capsys.readouterr().err == "torch sees no CUDA GPU\n"


def _job_text() -> str:
    from albor_serve.bench.gpu import child_command

    return child_command("albor", GpuJob("33m"))[-1]


def test_an_engine_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such engine"):
        gpu_torch.measure_torch("jax", GpuJob("33m"), SHAPE, lambda _row: None)
