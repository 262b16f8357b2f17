"""Files on which llama.cpp ends the process: each was found by fuzzing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from albor_serve.checkpoint import open_gguf_header
from albor_serve.checkpoint.preflight import check_for_native
from albor_serve.config import Architecture
from albor_serve.errors import CheckpointError
from albor_serve.loader import LoadOptions, load_model
from tests.fixtures_tiny import ARCHITECTURES, save_gguf, tiny_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "key",
    [
        "ARCH.attention.value_length",
        "ARCH.rope.dimension_count",
        "ARCH.attention.head_count",
        "ARCH.embedding_length",
        "ARCH.block_count",
    ],
)
@pytest.mark.parametrize("value", [0, 8, 513, (1 << 32) - 1])
def test_sizes_that_do_not_fit_are_refused_before_native_code(
    tmp_path: Path, arch: Architecture, key: str, value: int
) -> None:
    refused(save(tmp_path, arch, {key.replace("ARCH", arch): value}))


def test_an_unknown_rope_scaling(tmp_path: Path) -> None:
    refused(save(tmp_path, "llama", {"llama.rope.scaling.type": "spiral"}))


def test_experts_of_which_none_is_used(tmp_path: Path) -> None:
    refused(save(tmp_path, "llama", {"llama.expert_count": 15}), match="experts")


def test_a_sentencepiece_vocabulary_without_bytes(tmp_path: Path) -> None:
    refused(save(tmp_path, "llama", {"tokenizer.ggml.model": "llama"}), match="single bytes")


def test_a_token_that_occurs_twice(tmp_path: Path) -> None:
    path = save(tmp_path, "llama", {})
    data = path.read_bytes()
    once, twice = b"<|reserved_9|>", b"<|reserved_10|>"
    assert data.count(b"<|reserved_11|>") == data.count(twice) == 1
    assert once in data
    path.write_bytes(data.replace(twice, b"<|reserved_11|>"))
    refused(path, match="twice")


def test_tensors_that_lie_where_llama_cpp_can_not_use_them(tmp_path: Path) -> None:
    # The header's length, which the name changes, decides where they begin.
    for length in range(1, 33, 8):
        changes = {"general.alignment": 8, "general.name": "n" * length}
        path = save(tmp_path, "llama", changes)
        if any(tensor.offset % 32 for tensor in open_gguf_header(path).tensors.values()):
            break
    else:
        pytest.fail("all of them are aligned")
    refused(path, match="multiples of 32")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_sound_file_passes(tmp_path: Path, arch: Architecture) -> None:
    check_for_native(open_gguf_header(save(tmp_path, arch, {})))


def save(folder: Path, arch: Architecture, metadata: dict[str, Any]) -> Path:
    config, weights = tiny_model(arch)
    return save_gguf(folder / "model.gguf", config, weights, metadata=metadata)


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path, LoadOptions(num_slots=1, num_threads=1))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
