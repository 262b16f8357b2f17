"""--backend cuda: what is opened and closed around the GPU backend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from albor_serve import loader  # noqa: E402
from albor_serve.backends import cuda  # noqa: E402
from albor_serve.backends.llamacpp import LlamaCppVocabulary  # noqa: E402
from albor_serve.checkpoint.gguf import GgufCheckpoint, open_gguf_checkpoint  # noqa: E402
from albor_serve.errors import BackendError, ConfigError  # noqa: E402
from albor_serve.loader import EMBEDDED_MODEL, open_backend  # noqa: E402
from tests.fakes import HashBackend  # noqa: E402


@pytest.fixture
def checkpoint() -> GgufCheckpoint:
    return open_gguf_checkpoint(Path(str(resources.files("albor_models") / EMBEDDED_MODEL)))


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each vocabulary that is closed; a GPU seems to be there."""
    told: list[str] = []

    class Vocabulary(LlamaCppVocabulary):
        def close(self) -> None:
            told.append("vocabulary")
            super().close()

    monkeypatch.setattr(loader, "LlamaCppVocabulary", Vocabulary)
    monkeypatch.setattr(cuda, "unsupported", lambda _checkpoint: None)
    return told


def _from_gguf(make: Callable[..., Any]) -> Any:
    return classmethod(lambda _cls, *arguments, **options: make(*arguments, **options))


def test_the_backend_gets_the_models_words_and_frees_them(
    checkpoint: GgufCheckpoint, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frees: list[Callable[[], None]] = []

    def make(_checkpoint: object, num_slots: int, *_: object, on_close: Callable[[], None]) -> Any:
        frees.append(on_close)
        return HashBackend(16_384, num_slots=num_slots)

    monkeypatch.setattr(cuda.CudaBackend, "from_gguf", _from_gguf(make))
    opened = open_backend(checkpoint, 2, 64, choice="cuda")
    assert opened.backend.info.num_slots == 2
    assert opened.kind == "qwen3 Q4_0, 34M parameters"
    assert opened.tokenizer.decode(opened.tokenizer.encode("def f():")) == b"def f():"
    assert closed == []
    frees[0]()
    assert closed == ["vocabulary"]


def test_a_backend_that_does_not_open_leaves_nothing_open(
    checkpoint: GgufCheckpoint, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BackendError("the GPU is out of memory")

    monkeypatch.setattr(cuda.CudaBackend, "from_gguf", _from_gguf(fail))
    with pytest.raises(BackendError, match="out of memory"):
        open_backend(checkpoint, 1, 64, choice="cuda")
    assert closed == ["vocabulary"]


def test_without_torch_the_extra_is_named(
    checkpoint: GgufCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "albor_serve.backends.cuda", None)
    monkeypatch.delattr("albor_serve.backends.cuda", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'albor\[gpu\]'"):
        open_backend(checkpoint, 1, 64, choice="cuda")
