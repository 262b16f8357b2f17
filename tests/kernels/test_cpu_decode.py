"""albor's CPU kernels against their reference, in every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from albor_serve.backends import thread_governor
from albor_serve.backends.base import Aborted, Backend, ExtendStep, LogitRows
from albor_serve.backends.cpu import CpuBackend, rope_tables, unsupported
from albor_serve.checkpoint import GgufCheckpoint
from albor_serve.checkpoint.gguf import open_gguf_checkpoint
from albor_serve.config import ModelConfig
from albor_serve.errors import BackendError, ConfigError
from albor_serve.kernels import cpu_decode
from albor_serve.kernels.cpu_decode import (
    best_instruction_set,
    load_kernels,
    reference_logits,
    shape_problem,
)
from tests.fixtures_tiny import (
    ARCHITECTURES,
    ROPE_SCALINGS,
    random_tokens,
    save_gguf,
    tiny_model,
)

MAX_SEQ_LEN = 200
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HERE = [
    name
    for name, needed in cpu_decode._NEEDED.items()
    if needed <= set(FLAGS.partition("flags")[2].partition("\n")[0].split())
]
pytestmark = pytest.mark.skipif(not HERE, reason="this processor has no AVX2")


def open_tiny(
    folder: Path, file_type: Any, arch: Any = "qwen3", **overrides: Any
) -> GgufCheckpoint:
    config, weights = tiny_model(arch, seed=3, **overrides)
    return open_gguf_checkpoint(
        save_gguf(folder / "tiny.gguf", config, weights, file_type=file_type)
    )


def reference(checkpoint: GgufCheckpoint, tokens: list[int], **options: Any) -> LogitRows:
    config = checkpoint.config
    cos, sin = rope_tables(config.rope, config.head_dim, MAX_SEQ_LEN)
    return reference_logits(config, cos, sin, checkpoint.read, tokens, **options)  # type: ignore[return-value]


def extend(backend: Backend, tokens: list[int], slot: int = 0, rows: Any = "all") -> LogitRows:
    return backend.extend([ExtendStep(slot, tokens, rows)])[0].copy()


def error(actual: Any, expected: Any) -> float:
    """Largest difference in units of the logits' spread."""
    return float(np.abs(actual - expected).max() / expected.std())


@pytest.mark.parametrize("kernels", HERE)
@pytest.mark.parametrize("file_type", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_the_reference(tmp_path: Path, arch: Any, file_type: Any, kernels: Any) -> None:
    # One layer: further down, a number that falls on the other side of a rounding border in
    # float32 than in float64 moves everything after it.
    checkpoint = open_tiny(tmp_path, file_type, arch, num_layers=1)
    backend = CpuBackend(checkpoint, 1, MAX_SEQ_LEN, 1, instruction_set=kernels)
    tokens = random_tokens(checkpoint.config, 150, seed=1)
    try:
        expected = reference(checkpoint, tokens)
        differences = np.abs(extend(backend, tokens) - expected) / expected.std()
        assert np.quantile(differences, 0.5) < 1e-4
        assert differences.max() < 0.05
    finally:
        backend.close()


@pytest.mark.parametrize("kernels", HERE)
@pytest.mark.parametrize(
    "overrides",
    [
        {"vocab_size": 509},  # the last tile is not full
        {"num_heads": 6, "num_kv_heads": 1, "head_dim": 64},  # six heads on one, wide heads
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 48},  # three vectors to a head
        {"num_heads": 3, "num_kv_heads": 1, "head_dim": 128, "tie_embeddings": False},
        {"hidden_size": 96, "intermediate_size": 160},
        {"rope": ROPE_SCALINGS["linear"]},
    ],
)
def test_odd_shapes(tmp_path: Path, overrides: dict[str, Any], kernels: Any) -> None:
    checkpoint = open_tiny(tmp_path, "Q8_0", num_layers=1, **overrides)
    backend = CpuBackend(checkpoint, 1, MAX_SEQ_LEN, 2, instruction_set=kernels)
    tokens = random_tokens(checkpoint.config, 70, seed=1)
    try:
        assert error(extend(backend, tokens), reference(checkpoint, tokens)) < 0.05
    finally:
        backend.close()


def test_rounding_inputs_costs_little(tmp_path: Path) -> None:
    checkpoint = open_tiny(tmp_path, "Q8_0")
    tokens = random_tokens(checkpoint.config, 100, seed=2)
    exact = reference(checkpoint, tokens, round_inputs=False)
    backend = CpuBackend(checkpoint, 1, MAX_SEQ_LEN, 1)
    try:
        got = extend(backend, tokens)
    finally:
        backend.close()
    assert error(got, exact) < 0.15
    assert (got.argmax(-1) == exact.argmax(-1)).mean() > 0.93


@pytest.fixture(scope="module", params=[(k, t) for k in HERE for t in (1, 2, 3)], ids=str)
def backend(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CpuBackend]:
    kernels, threads = request.param
    checkpoint = open_tiny(tmp_path_factory.mktemp("cpu"), "Q4_0", head_dim=64)
    made = CpuBackend(checkpoint, 3, MAX_SEQ_LEN, threads, instruction_set=kernels)
    yield made
    made.close()


@pytest.fixture
def fresh(backend: CpuBackend) -> CpuBackend:
    backend.abort.clear()
    for slot in range(3):
        backend.rewind(slot, 0)
    return backend


def tokens_of(backend: Backend, count: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    tokens: list[int] = rng.integers(0, backend.info.vocab_size, count).tolist()
    return tokens


@pytest.mark.parametrize("cuts", [[1] * 20, [2, 3, 4, 5, 6, 7, 8, 9], [63, 1, 65, 2], [130, 20]])
def test_chunks_change_no_bit(fresh: CpuBackend, cuts: list[int]) -> None:
    tokens = tokens_of(fresh, sum(cuts), 1)
    whole = extend(fresh, tokens)
    begin = 0
    for count in cuts:
        part = extend(fresh, tokens[begin : begin + count], slot=1)
        assert np.array_equal(part, whole[begin : begin + count])
        begin += count
        assert fresh.length(1) == begin


def test_slots_change_no_bit_of_each_other(fresh: CpuBackend) -> None:
    a, b, c = (tokens_of(fresh, n, n) for n in (37, 5, 61))
    alone = {slot: extend(fresh, t, slot) for slot, t in ((0, a), (1, b), (2, c))}
    for slot in range(3):
        fresh.rewind(slot, 0)
    rows = fresh.extend(
        [ExtendStep(2, c, "all"), ExtendStep(0, a, "last"), ExtendStep(1, b, "none")]
    )
    assert np.array_equal(rows[0], alone[2])
    assert np.array_equal(rows[1], alone[0][-1:])
    assert rows[2].shape == (0, fresh.info.vocab_size)
    # One token of each slot at once is the decoding of three requests.
    more = [tokens_of(fresh, 1, 50 + slot) for slot in range(3)]
    together = fresh.extend([ExtendStep(slot, more[slot], "last") for slot in range(3)])
    together = [row.copy() for row in together]
    for slot in range(3):
        fresh.rewind(slot, fresh.length(slot) - 1)
        assert np.array_equal(extend(fresh, more[slot], slot), together[slot])


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 17, 49, 50])
def test_rewind_and_fork_equal_fresh(fresh: CpuBackend, kept: int) -> None:
    tokens, other = tokens_of(fresh, 50, 4), tokens_of(fresh, 20, 5)
    extend(fresh, tokens)
    extend(fresh, tokens_of(fresh, 90, 6), slot=2)
    fresh.fork(0, 2, kept)
    fresh.rewind(0, kept)
    assert (fresh.length(0), fresh.length(2)) == (kept, kept)
    want = extend(fresh, tokens[:kept] + other, slot=1)[kept:]
    assert np.array_equal(extend(fresh, other), want)
    assert np.array_equal(extend(fresh, other, slot=2), want)


def test_an_abort_keeps_a_valid_cache(fresh: CpuBackend) -> None:
    tokens = tokens_of(fresh, 150, 7)
    fresh.abort.set()
    with pytest.raises(Aborted):
        extend(fresh, tokens)
    assert fresh.length(0) == 0
    fresh.abort.clear()
    whole = extend(fresh, tokens, slot=1)
    # Seen by the kernel itself, as when another thread sets it in the middle of a call.
    fresh._decoder.extend(  # type: ignore[union-attr]
        *(np.array(x, dtype=np.int32) for x in (tokens[:9], [0] * 9, range(9))),
        np.zeros(9, dtype=np.int8),
        np.empty((1, fresh.info.vocab_size), dtype=np.float32),
        fresh._num_threads,
        _address_of_one(),
    )
    assert np.array_equal(extend(fresh, tokens), whole)


_ONE = np.ones(1, dtype=np.uint8)


def _address_of_one() -> int:
    return _ONE.ctypes.data


def test_refuses_what_it_cannot_hold(fresh: CpuBackend) -> None:
    with pytest.raises(BackendError, match="has room for"):
        extend(fresh, tokens_of(fresh, MAX_SEQ_LEN + 1, 8))
    with pytest.raises(BackendError, match="outside the vocabulary"):
        extend(fresh, [fresh.info.vocab_size])
    with pytest.raises(BackendError, match="0 or more"):
        fresh.rewind(0, -1)


def test_small_passes_are_left_to_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_tiny(tmp_path, "Q4_0")
    made = CpuBackend(checkpoint, 1, 32, 2)
    used: list[int] = []
    monkeypatch.setattr(made, "_governor", SimpleNamespace(threads=lambda: 2))
    run = made._open().extend

    def spy(*arguments: Any) -> int:
        used.append(arguments[5])
        return run(*arguments)

    monkeypatch.setattr(made._open(), "extend", spy)
    try:
        extend(made, [1])
        monkeypatch.setattr(thread_governor, "SMALL_PASS_BYTES", 0)
        extend(made, [2])
    finally:
        made.close()
    assert used == [1, 2]


def test_closing(tmp_path: Path) -> None:
    closed: list[bool] = []
    checkpoint = open_tiny(tmp_path, "Q4_0")
    made = CpuBackend(checkpoint, 1, 32, 2, on_close=lambda: closed.append(True))
    made.close()
    made.close()
    assert closed == [True]
    with pytest.raises(BackendError, match="closed"):
        made.length(0)


def test_says_what_it_cannot_run(tmp_path: Path) -> None:
    assert unsupported(open_tiny(tmp_path, "Q4_0")) is None
    assert "F16" in (unsupported(open_tiny(tmp_path, "F16")) or "")
    yarn = open_tiny(tmp_path, "Q4_0", rope=ROPE_SCALINGS["yarn"])
    assert "yarn" in (unsupported(yarn) or "")
    config, _ = tiny_model("qwen3")
    for change, word in (
        ({"head_dim": 24}, "head_dim"),
        ({"num_heads": 1, "num_kv_heads": 1, "head_dim": 16}, "query heads"),
        ({"hidden_size": 80}, "hidden_size"),
        ({"intermediate_size": 100}, "intermediate_size"),
    ):
        assert word in (shape_problem(_with(config, change)) or "")
    with pytest.raises(BackendError, match="yarn"):
        CpuBackend(yarn, 1, 32)
    with pytest.raises(ConfigError, match="num_slots"):
        CpuBackend(open_tiny(tmp_path, "Q4_0"), 0, 32)


def _with(config: ModelConfig, change: dict[str, Any]) -> ModelConfig:
    from dataclasses import replace

    return replace(config, **change)


def test_instruction_sets() -> None:
    def flags(*names: str) -> str:
        return "processor : 0\nflags\t\t: " + " ".join(names) + "\n"

    avx2 = ("avx2", "f16c", "fma")
    assert best_instruction_set(flags(*avx2)) == "avx2"
    assert best_instruction_set(flags(*avx2, "avx_vnni")) == "avxvnni"
    wide = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
    assert best_instruction_set(flags(*avx2, *wide)) == "avx512"
    assert best_instruction_set(flags("sse2")) is None
    assert best_instruction_set("") is None


def test_missing_kernels_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_decode, "__file__", str(tmp_path / "cpu_decode.py"))
    load_kernels.cache_clear()
    try:
        with pytest.raises(BackendError, match="not compiled"):
            load_kernels("avx2")
        (tmp_path / "_cpu_avx2.so").write_bytes(b"not a library")
        with pytest.raises(BackendError, match="can't be loaded"):
            load_kernels("avx2")
    finally:
        load_kernels.cache_clear()
