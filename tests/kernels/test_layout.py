"""The tile layout of Q4_0 weights: repacking loses nothing, and refuses what it cannot cover."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from albor_serve.config import ModelConfig  # noqa: E402
from albor_serve.errors import CheckpointFormatError, UnsupportedModelError  # noqa: E402
from albor_serve.kernels.layout import (  # noqa: E402
    TILE_WORDS,
    dequantize_tiles,
    interleave_rows,
    repack_q4_0,
)
from albor_serve.kernels.synthetic import RandomModel  # noqa: E402
from albor_serve.kernels.weights import random_q4_0  # noqa: E402
from albor_serve.quant import dequantize_q4_0  # noqa: E402


@pytest.mark.parametrize(("rows", "cols"), [(16, 128), (48, 384)])
def test_repacked_weights_are_those_of_the_gguf_bytes(rows: int, cols: int) -> None:
    packed = random_q4_0(rows, cols, np.random.default_rng(3))
    tiles = repack_q4_0(torch.from_numpy(packed), cols)
    assert tiles.shape == (rows // 16 * (cols // 128) * TILE_WORDS,)
    expected = dequantize_q4_0(packed).reshape(rows, cols)
    assert np.array_equal(dequantize_tiles(tiles, rows, cols).numpy(), expected)


def test_random_model_reads_what_it_packs() -> None:
    config = ModelConfig(
        "qwen3", 64, 128, 128, 1, 2, 1, 64, 64, qk_norm=True, tie_embeddings=True
    )  # fmt: skip
    model = RandomModel(config)
    weights = model.pack("cpu", 64)
    expected = model.read("model.layers.0.mlp.down_proj.weight")
    assert np.array_equal(dequantize_tiles(weights.down[0], 128, 128).numpy(), expected)
    assert np.array_equal(
        dequantize_tiles(weights.head, 64, 128).numpy(), model.read("model.embed_tokens.weight")
    )


def test_gate_and_up_rows_alternate_by_eight() -> None:
    gate = torch.arange(16).reshape(16, 1)
    both = interleave_rows([gate, gate + 100]).flatten().tolist()
    assert both == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]


def test_a_size_that_tiles_cannot_cover_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="8 x 128"):
        repack_q4_0(torch.zeros(8, 72, dtype=torch.uint8), 128)


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(CheckpointFormatError, match="needs 72"):
        repack_q4_0(torch.zeros(16, 71, dtype=torch.uint8), 128)
