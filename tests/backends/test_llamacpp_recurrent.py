"""A model whose state cannot be cut in the middle (Mamba): rewinding empties the slot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from albor_serve.backends.base import Aborted, ExtendStep
from albor_serve.backends.llamacpp import LlamaCppBackend
from tests.fixtures_tiny import add_vocabulary, random_tokens, tiny_model

CONFIG = tiny_model("llama")[0]  # for its vocabulary
TOKENS = random_tokens(CONFIG, 60)


def save_mamba(path: Path) -> Path:
    d, inner, state, rank, vocab = 32, 64, 16, 4, CONFIG.vocab_size
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(256)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(2)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    add_vocabulary(writer, CONFIG)

    def add(name: str, *shape: int, std: float = 0.2, mean: float = 0.0) -> None:
        array = mean + std * rng.standard_normal(shape)
        writer.add_tensor(name, array.astype(np.float32))

    add("token_embd.weight", vocab, d, std=0.5)
    add("output_norm.weight", d, mean=1.0)
    for layer in ("blk.0.", "blk.1."):
        add(layer + "attn_norm.weight", d, mean=1.0)
        add(layer + "ssm_in.weight", 2 * inner, d)
        add(layer + "ssm_conv1d.weight", inner, 4)
        add(layer + "ssm_conv1d.bias", inner)
        add(layer + "ssm_x.weight", rank + 2 * state, inner)
        add(layer + "ssm_dt.weight", inner, rank)
        add(layer + "ssm_dt.bias", inner)
        writer.add_tensor(
            layer + "ssm_a", -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
        )
        add(layer + "ssm_d", inner, mean=1.0)
        add(layer + "ssm_out.weight", d, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
