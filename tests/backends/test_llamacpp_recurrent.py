"""A model whose state cannot be cut in the middle (Mamba): rewinding empties the slot."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from albor_serve.backends.base import Aborted, ExtendStep
from albor_serve.backends.llamacpp import LlamaCppBackend
from tests.fixtures_foreign import CONFIG, save_mamba
from tests.fixtures_tiny import random_tokens

TOKENS = random_tokens(CONFIG, 60)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppBackend]:
    path = save_mamba(tmp_path_factory.mktemp("gguf") / "mamba.gguf")
    backend = LlamaCppBackend.load(path, 2, 128, num_threads=1, micro_batch_len=8)
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture
def backend(loaded: LlamaCppBackend) -> LlamaCppBackend:
    for slot in range(2):
        loaded.rewind(slot, 0)
    return loaded


def logits(backend: LlamaCppBackend, slot: int, tokens: list[int]) -> np.ndarray:
    return backend.extend([ExtendStep(slot, tokens, "last")])[0].copy()


def test_it_says_that_it_cannot_rewind(backend: LlamaCppBackend) -> None:
    assert not backend.model_info.can_rewind
    assert backend.model_info.architecture == "mamba"


def test_many_calls_equal_one(backend: LlamaCppBackend) -> None:
    once = logits(backend, 0, TOKENS)
    for token in TOKENS:
        last = logits(backend, 1, [token])
    np.testing.assert_allclose(last, once, atol=1e-3)


def test_rewind_empties_and_the_slot_is_usable(backend: LlamaCppBackend) -> None:
    fresh = logits(backend, 0, TOKENS)
    backend.rewind(0, 59)
    assert backend.length(0) == 0
    np.testing.assert_allclose(logits(backend, 0, TOKENS), fresh, atol=1e-4)


def test_fork_of_the_whole_works_and_of_a_part_gives_nothing(backend: LlamaCppBackend) -> None:
    fresh = logits(backend, 0, TOKENS)
    backend.rewind(0, 0)
    logits(backend, 0, TOKENS[:30])
    backend.fork(0, 1, 30)
    assert backend.length(1) == 30
    np.testing.assert_allclose(logits(backend, 1, TOKENS[30:]), fresh, atol=1e-4)
    np.testing.assert_allclose(logits(backend, 0, TOKENS[30:]), fresh, atol=1e-4)
    backend.fork(0, 1, 20)
    assert backend.length(1) == 0
    np.testing.assert_allclose(logits(backend, 1, TOKENS), fresh, atol=1e-4)


def test_abort_leaves_a_usable_slot(backend: LlamaCppBackend) -> None:
    fresh = logits(backend, 0, TOKENS)
    for attempt in range(20):
        backend.rewind(0, 0)
        logits(backend, 0, TOKENS[:10])
        timer = threading.Timer(0.0001 * attempt, backend.abort.set)
        timer.start()
        try:
            while True:
                logits(backend, 0, TOKENS[10:])
                backend.rewind(0, 0)
                logits(backend, 0, TOKENS[:10])
        except Aborted:
            pass
        finally:
            timer.join()
            backend.abort.clear()
        held = backend.length(0)
        assert held in (0, 10, 60)
        if held != 60:
            np.testing.assert_allclose(logits(backend, 0, TOKENS[held:]), fresh, atol=1e-3)
