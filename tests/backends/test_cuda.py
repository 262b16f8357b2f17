"""The GPU backend: its rules on a device, and in Triton's interpreter where there is none."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from albor_serve.backends import cuda  # noqa: E402
from albor_serve.checkpoint.gguf import open_gguf_checkpoint  # noqa: E402
from albor_serve.config import ModelConfig  # noqa: E402
from albor_serve.errors import BackendError, ConfigError, UnsupportedModelError  # noqa: E402
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
    with pytest.raises(BackendError, match="lower --slots or --ctx"):
        cuda.CudaBackend(config, model.q4_rows, model.read, 1, 16, device="cpu")


def test_a_shape_that_the_kernels_do_not_cover_is_refused() -> None:
    config = ModelConfig("llama", 64, 96, 128, 1, 3, 1, 32, 64, tie_embeddings=True)
    model = RandomModel(config)
    with pytest.raises(UnsupportedModelError, match="multiple of 128"):
        cuda.CudaBackend(config, model.q4_rows, model.read, 1, 16, device="cpu")


def test_cuda_failures_become_one_typed_error_and_end_the_backend() -> None:
    backend = object.__new__(cuda.CudaBackend)
    backend._failure = None
    backend._model = None
    with pytest.raises(BackendError, match="out of memory: lower"), backend._guard():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(BackendError, match="illegal address"), backend._guard():
        raise RuntimeError("CUDA error: illegal address\nmore")
    with pytest.raises(BackendError, match="start the server again"):
        backend.length(0)
