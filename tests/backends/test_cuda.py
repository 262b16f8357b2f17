"""The GPU backend: its rules on a device, and in Triton's interpreter where there is none."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from albor_serve.backends import cuda  # noqa: E402
from albor_serve.backends.base import BackendInfo  # noqa: E402
from albor_serve.checkpoint.gguf import open_gguf_checkpoint  # noqa: E402
from albor_serve.config import ModelConfig  # noqa: E402
from albor_serve.errors import (  # noqa: E402
    BackendError,
    ConfigError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    UnsupportedModelError,
)
from albor_serve.kernels.synthetic import RandomModel  # noqa: E402
from albor_serve.loader import EMBEDDED_MODEL, open_backend  # noqa: E402
from tests.scripts import run_script  # noqa: E402

RULES = "from tests.backends.cuda_rules import check; check({device!r})"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_backend_keeps_the_rules_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_script(RULES.format(device="cpu"), timeout_s=880)


@pytest.mark.gpu
def test_the_backend_keeps_the_rules_on_a_gpu() -> None:
    if not cuda.has_gpu():
        pytest.skip("no CUDA GPU")
    run_script(RULES.format(device="cuda"), environment={}, timeout_s=880)


@pytest.fixture
def small() -> tuple[ModelConfig, RandomModel]:
    config = ModelConfig("llama", 64, 128, 128, 1, 2, 1, 64, 64, tie_embeddings=True)
    return config, RandomModel(config)


@pytest.mark.skipif(cuda.has_gpu(), reason="there is a GPU")
def test_without_a_gpu_the_reason_and_a_remedy_are_given(
    small: tuple[ModelConfig, RandomModel],
) -> None:
    config, model = small
    with pytest.raises(BackendError, match="no CUDA GPU here"):
        cuda.CudaBackend(config, model.q4_rows, model.read, 1, 16)
    checkpoint = open_gguf_checkpoint(Path(str(resources.files("albor_models") / EMBEDDED_MODEL)))
    assert cuda.unsupported(checkpoint)
    with pytest.raises(ConfigError, match="leave out --backend cuda"):
        open_backend(checkpoint, 1, 64, choice="cuda")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"HAVE_TRITON": False}, "Triton is not installed"),
        ({"available": False}, "no CUDA GPU"),
        ({"capability": (7, 5)}, "older than compute capability 8.0"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], match: str
) -> None:
    monkeypatch.setattr(cuda, "HAVE_TRITON", change.get("HAVE_TRITON", True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: change.get("available", True))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda *_: change.get("capability", (9, 0))
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake GPU")
    checkpoint = open_gguf_checkpoint(Path(str(resources.files("albor_models") / EMBEDDED_MODEL)))
    reason = cuda.unsupported(checkpoint)
    assert reason is not None
    assert match in reason


def test_too_little_memory_while_loading_is_one_typed_error(
    small: tuple[ModelConfig, RandomModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = small

    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda, "load_decoder", full)
    with pytest.raises(DeviceMemoryError, match="lower --slots or --ctx"):
        cuda.CudaBackend(config, model.q4_rows, model.read, 1, 16, device="cpu")


def test_a_shape_that_the_kernels_do_not_cover_is_refused() -> None:
    config = ModelConfig("llama", 64, 96, 128, 1, 3, 1, 32, 64, tie_embeddings=True)
    model = RandomModel(config)
    with pytest.raises(UnsupportedModelError, match="multiple of 128"):
        cuda.CudaBackend(config, model.q4_rows, model.read, 1, 16, device="cpu")


def test_cuda_failures_become_one_typed_error_and_end_the_backend() -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: illegal address")

    backend = object.__new__(cuda.CudaBackend)
    backend._failure = None
    backend._is_closed = False
    backend._build = None
    backend._model = object()
    backend._device = torch.device("cpu")
    with pytest.raises(DeviceMemoryError, match="out of memory: lower"), backend._guard():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert backend._open() is backend._model
    backend._probe = fails  # type: ignore[method-assign]
    with pytest.raises(DeviceLostError, match="illegal address"), backend._guard():
        raise RuntimeError("CUDA error: illegal address\nmore")
    with pytest.raises(DeviceLostError, match="start the server again"):
        backend.length(0)
    with pytest.raises(DeviceLostError, match="start the server again"):
        backend.extend([])


def test_of_a_lost_gpu_nothing_is_freed_and_the_rest_is_closed_once() -> None:
    closed: list[int] = []
    backend = object.__new__(cuda.CudaBackend)
    backend._is_closed = False
    backend._build = None
    backend._model = model = object()
    backend._slots = slots = [object()]
    backend._failure = DeviceLostError("gone")
    backend._on_close = lambda: closed.append(1)
    backend.close()
    backend.close()
    assert closed == [1]
    assert (backend._model, backend._slots) == (model, slots)


class _Build:
    """A build of which the first groups are done."""

    def __init__(self, num_done: int) -> None:
        self.num_done = num_done

    def is_done(self, group: int) -> bool:
        return group < self.num_done


def test_until_a_plan_is_compiled_another_does_its_work(
    small: tuple[ModelConfig, RandomModel],
) -> None:
    _, model = small
    weights = model.pack("cpu", 64)
    backend = object.__new__(cuda.CudaBackend)
    backend._plans = cuda._plans(weights, torch.device("cpu"))
    wanted = [(n, length) for n in range(1, 9) for length in (0, cuda.LONG_CONTEXT + 1)]

    def rows(num_done: int) -> list[int]:
        backend._build = _Build(num_done)  # type: ignore[assignment]
        plans = [backend._plan(*one) for one in wanted]
        assert all(plan.num_tokens >= n for plan, (n, _) in zip(plans, wanted, strict=True))
        return [plan.num_tokens for plan in plans]

    assert rows(1) == [1, 1] + [8] * 14
    assert rows(3) == [1, 1, 8, 8] + [4, 8] * 2 + [8] * 8  # one token in a long context; four
    all_of_them = [1, 1, 2, 2] + [4] * 4 + [8] * 8
    assert rows(1 + len(cuda.LATER)) == all_of_them
    assert set(cuda.URGENT) | set(cuda.LATER) == set(backend._plans)
    backend._build = None
    assert [backend._plan(*one).num_tokens for one in wanted] == all_of_them


def test_kernels_that_compute_wrongly_are_found_at_the_start() -> None:
    backend = object.__new__(cuda.CudaBackend)
    backend._info = BackendInfo("cuda", "fake", 64, 1, 16, 16, 1, 1)
    backend._prefill = object()  # type: ignore[assignment]
    backend._slots = [SimpleNamespace(length=0)]  # type: ignore[list-item]
    right = np.linspace(-3, 3, 64, dtype=np.float32)[None]
    backend._by_torch = lambda *_: right  # type: ignore[method-assign]
    for wrong in (right * 0, right[:, ::-1], right * np.nan):
        backend._through_kernels = lambda *_, rows=wrong: rows  # type: ignore[method-assign]
        with pytest.raises(DeviceError, match="compute wrongly on this GPU"):
            backend._check()
    backend._through_kernels = lambda *_: right + 0.01  # type: ignore[method-assign]
    backend._check()
