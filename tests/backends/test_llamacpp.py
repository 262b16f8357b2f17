"""What is llama.cpp's own: file types, loading, errors, threads, aborts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from albor_serve.backends import llamacpp_native as native
from albor_serve.backends.base import Aborted, ExtendStep
from albor_serve.backends.llamacpp import LlamaCppBackend
from albor_serve.backends.torch_ref import TorchReferenceBackend
from albor_serve.config import Architecture, ModelConfig
from albor_serve.errors import (
    BackendError,
    CheckpointError,
    CheckpointFormatError,
    ConfigError,
)
from tests.fixtures_tiny import (
    ARCHITECTURES,
    ROPE_SCALINGS,
    Weights,
    random_tokens,
    reader,
    save_gguf,
    tiny_model,
)


def reference_logits(config: ModelConfig, weights: Weights, tokens: list[int]) -> Any:
    backend = TorchReferenceBackend(config, reader(weights), 1, len(tokens))
    try:
        return backend.extend([ExtendStep(0, tokens, "all")])[0]
    finally:
        backend.close()


def llamacpp_logits(path: Path, tokens: list[int], **arguments: Any) -> Any:
    backend = LlamaCppBackend.load(path, 1, len(tokens), num_threads=1, **arguments)
    try:
        return backend.extend([ExtendStep(0, tokens, "all")])[0].copy()
    finally:
        backend.close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, weights = tiny_model("qwen3")
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", config, weights)


@pytest.fixture
def backend(gguf: Path) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend.load(gguf, 2, 200, num_threads=1, micro_batch_len=16)
    try:
        yield backend
    finally:
        backend.close()


# Root mean square of the difference, for logits with a standard deviation of 2. At these widths
# rounding the cache to F16 changes them by up to 1e-2, rounding weights or activations to 8 bits
# by up to 0.13.
@pytest.mark.parametrize(
    ("file_type", "kv_type", "flash", "tolerance"),
    [
        ("F32", "f32", False, 2e-5),
        ("F32", "f16", False, 1.5e-2),
        ("F32", "f32", True, 3e-2),
        ("F16", "f16", False, 1.5e-2),
        ("BF16", "f16", False, 0.2),
        ("Q8_0", "f16", False, 0.2),
    ],
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_file_types_against_the_reference(
    arch: Architecture, file_type: Any, kv_type: str, flash: bool, tolerance: float, tmp_path: Path
) -> None:
    config, weights = tiny_model(arch, seed=11)
    path = save_gguf(tmp_path / "m.gguf", config, weights, file_type=file_type)
    tokens = random_tokens(config, 100)
    actual = llamacpp_logits(path, tokens, kv_type=kv_type, flash_attention=flash)
    expected = reference_logits(config, weights, tokens)
    assert float(np.sqrt(np.square(actual - expected).mean())) <= tolerance


@pytest.mark.parametrize(
    ("arch", "rope"),
    [
        (arch, rope)
        for arch in ARCHITECTURES
        for rope in ROPE_SCALINGS
        if rope != "llama3" or arch == "llama"  # GGUF's qwen2 and qwen3 have no such scaling
    ],
)
def test_rope_scalings_against_the_reference(arch: Architecture, rope: str, tmp_path: Path) -> None:
    config, weights = tiny_model(arch, seed=12, rope=ROPE_SCALINGS[rope])
    path = save_gguf(tmp_path / "m.gguf", config, weights)
    tokens = random_tokens(config, 200)
    actual = llamacpp_logits(path, tokens, kv_type="f32")
    assert float(np.abs(actual - reference_logits(config, weights, tokens)).max()) <= 1e-3


def test_model_info(backend: LlamaCppBackend) -> None:
    config, _ = tiny_model("qwen3")
    info = backend.model_info
    assert (info.architecture, info.name) == ("qwen3", "tiny qwen3")
    assert info.num_parameters == config.num_parameters
    assert info.size_bytes == 4 * config.num_parameters
    assert (info.vocab_size, info.train_seq_len) == (512, 256)
    assert (info.num_layers, info.hidden_size, info.can_rewind) == (2, 64, True)
    assert "qwen3" in info.description
    assert backend.info.device == "cpu (1 thread)"


def test_all_rows_of_a_full_batch(backend: LlamaCppBackend) -> None:
    tokens = random_tokens(tiny_model("qwen3")[0], 200)
    steps = [ExtendStep(0, tokens, "all"), ExtendStep(1, tokens, "all")]
    first, second = backend.extend(steps)
    assert first.shape == second.shape == (200, 512)
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_batch_limit(gguf: Path) -> None:
    backend = LlamaCppBackend.load(gguf, 2, 64, num_threads=1, max_batch_len=32)
    try:
        assert backend.info.max_batch_len == 32
        with pytest.raises(BackendError, match="33 tokens in one call, but at most 32 fit"):
            backend.extend([ExtendStep(0, [20] * 30, "none"), ExtendStep(1, [20] * 3, "none")])
        backend.extend([ExtendStep(0, [20] * 30, "all"), ExtendStep(1, [20] * 2, "all")])
    finally:
        backend.close()


def test_context_of_odd_size_holds_every_token(gguf: Path) -> None:
    backend = LlamaCppBackend.load(gguf, 3, 257, num_threads=1)
    try:
        tokens = random_tokens(tiny_model("qwen3")[0], 257)
        for slot in range(3):
            backend.extend([ExtendStep(slot, tokens, "last")])
            assert backend.length(slot) == 257
    finally:
        backend.close()


def test_aborted_prefill_keeps_whole_micro_batches(backend: LlamaCppBackend) -> None:
    tokens = random_tokens(tiny_model("qwen3")[0], 200)
    held: set[int] = set()
    for attempt in range(200):
        backend.rewind(0, 0)
        timer = threading.Timer(0.0001 * (attempt % 40), backend.abort.set)
        timer.start()
        try:
            backend.extend([ExtendStep(0, tokens, "none")])
        except Aborted:
            held.add(backend.length(0))
        finally:
            timer.join()
            backend.abort.clear()
        if any(0 < n < 200 for n in held):
            break
    else:
        pytest.fail(f"no abort fell into the middle of the prefill: {held}")
    assert all(n % 16 == 0 for n in held)


def test_progress_is_reported_in_order(gguf: Path) -> None:
    seen: list[float] = []
    LlamaCppBackend.load(gguf, 1, 32, 1, progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_progress_can_end_the_load(gguf: Path) -> None:
    def refuse(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LlamaCppBackend.load(gguf, 1, 32, 1, progress=refuse)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_loading_without_mmap(gguf: Path, use_mmap: bool) -> None:
    backend = LlamaCppBackend.load(gguf, 1, 32, 1, use_mmap=use_mmap)
    try:
        assert backend.extend([ExtendStep(0, [20])])[0].shape == (1, 512)
    finally:
        backend.close()


class TestBadFiles:
    def load(self, path: Path) -> None:
        LlamaCppBackend.load(path, 1, 32, 1).close()

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"cannot read the model file .*No such file"):
            self.load(tmp_path / "nothing.gguf")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot read the model file"):
            self.load(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"GGU", b"{}", b"\x00" * 100])
    def test_something_else(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(CheckpointFormatError, match="is not a GGUF file"):
            self.load(tmp_path / "m.gguf")

    @pytest.mark.parametrize("kept", [0.0001, 0.3, 0.9])
    def test_truncated(self, tmp_path: Path, gguf: Path, kept: float) -> None:
        data = gguf.read_bytes()
        (tmp_path / "m.gguf").write_bytes(data[: max(4, int(kept * len(data)))])
        with pytest.raises(CheckpointError, match=r"llama\.cpp cannot load .* \(.+\)") as info:
            self.load(tmp_path / "m.gguf")
        assert "\n" not in str(info.value)

    def test_unknown_architecture(self, tmp_path: Path) -> None:
        config, weights = tiny_model("llama")
        path = save_gguf(
            tmp_path / "m.gguf", config, weights, metadata={"general.architecture": "nosuch"}
        )
        with pytest.raises(CheckpointError, match="nosuch"):
            self.load(path)

    def test_missing_tensor(self, tmp_path: Path) -> None:
        config, weights = tiny_model("qwen2")
        del weights["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight"):
            self.load(save_gguf(tmp_path / "m.gguf", config, weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 0}, "num_slots is 0"),
        ({"num_slots": 65}, "num_slots is 65"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"num_threads": -1}, "num_threads is -1"),
        ({"max_batch_len": 1}, "at least the 2 slots"),
        ({"micro_batch_len": 0}, "micro_batch_len is 0"),
    ],
)
def test_bad_sizes(gguf: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaCppBackend.load(gguf, **({"num_slots": 2, "max_seq_len": 32} | arguments))


def test_context_that_does_not_fit_into_memory(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available_memory_bytes", lambda: 3 << 29)
    with pytest.raises(BackendError, match=r"need 2\.0 GiB and 1\.5 GiB .* lower --slots or --ctx"):
        LlamaCppBackend.load(gguf, 4, 1 << 20, 1)


def test_available_memory_is_plausible() -> None:
    available = native.available_memory_bytes()
    assert available is None or 1 << 20 < available < 1 << 50


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's address limit")
def test_memory_that_the_system_refuses(gguf: Path) -> None:
    program = f"""
import resource
from albor_serve.backends.llamacpp import LlamaCppBackend
from albor_serve.errors import BackendError
LlamaCppBackend.load({str(gguf)!r}, 1, 32, 1).close()
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    LlamaCppBackend.load({str(gguf)!r}, 2, 1 << 20, 1)
except BackendError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=Path.cwd(), timeout=120
    )
    assert b"could not make a context of 2 slots" in done.stdout, done
    assert b"lower --slots or --ctx" in done.stdout


def test_nothing_is_printed(gguf: Path) -> None:
    """Neither while loading and computing nor when the interpreter ends with a model open."""
    program = f"""
from albor_serve.backends.llamacpp import LlamaCppBackend
from albor_serve.backends.base import ExtendStep
kept = LlamaCppBackend.load({str(gguf)!r}, 1, 32, 1)
kept.extend([ExtendStep(0, [20])])
other = LlamaCppBackend.load({str(gguf)!r}, 1, 32, 1)
other.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=Path.cwd(), timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


X86 = "processor : 0\nflags\t\t: fpu pni ssse3 avx avx2 f16c fma bmi2\n"


def test_cpu_features_that_fit() -> None:
    native.check_cpu_features("CPU : AVX2 = 1 | FMA = 1 | OPENMP = 1 | REPACK = 1 | ", X86)
    native.check_cpu_features("CPU : AVX512 = 0 | AVX2 = 1 | ", X86)
    native.check_cpu_features("CPU : AVX512 = 1 | ", "processor : 0\n")  # nothing to compare with


def test_cpu_features_that_are_missing() -> None:
    with pytest.raises(BackendError, match=r"needs AVX512, AVX512_VNNI, .*--no-binary :all:"):
        native.check_cpu_features("CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | ", X86)


def test_cpu_features_of_arm() -> None:
    info = "Features\t: fp asimd asimddp\n"
    native.check_cpu_features("CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 | ", info)
    with pytest.raises(BackendError, match="needs SVE"):
        native.check_cpu_features("CPU : NEON = 1 | SVE = 1 | ", info)


def test_threads_are_physical_cores() -> None:
    assert 1 <= native.num_physical_cores() <= (os.cpu_count() or 1)


def test_abort_flag_without_a_backend() -> None:
    flag = native.NativeAbortFlag()
    assert not flag.is_set()
    flag.set()
    flag.set()
    assert flag.is_set()
    flag.clear()
    assert not flag.is_set()
