from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from albor_serve.config import EngineConfig, ModelConfig, RopeConfig
from albor_serve.errors import ConfigError

QWEN3 = ModelConfig(
    "qwen3", 16_384, 512, 1536, 8, 8, 4, 64, 2048, qk_norm=True, tie_embeddings=True
)
LLAMA_350M = ModelConfig("llama", 32_768, 1024, 4096, 24, 16, 4, 64, 2048, tie_embeddings=True)


def test_counts_parameters() -> None:
    assert LLAMA_350M.num_parameters == 398_509_056
    assert QWEN3.num_parameters == pytest.approx(33.56e6, rel=1e-3)
    untied = replace(LLAMA_350M, tie_embeddings=False)
    assert untied.num_parameters - LLAMA_350M.num_parameters == 32_768 * 1024
    biased = replace(LLAMA_350M, qkv_bias=True)
    assert biased.num_parameters - LLAMA_350M.num_parameters == 24 * (16 + 4 + 4) * 64


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"vocab_size": -1},
        {"hidden_size": 1.5},
        {"num_heads": True},
        {"num_kv_heads": 3},
        {"head_dim": 63},
        {"rms_norm_eps": 0.0},
        {"rms_norm_eps": math.nan},
    ],
)
def test_refuses_shapes_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(QWEN3, **change)


@pytest.mark.parametrize(
    "values",
    [
        {"theta": 0.0},
        {"theta": math.inf},
        {"factor": 0.5},
        {"factor": math.nan},
        {"scaling": "yarn"},
        {"scaling": "llama3", "original_max_seq_len": 0},
    ],
)
def test_refuses_rotations_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RopeConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"num_slots": 0},
        {"num_slots": 65},
        {"num_slots": True},
        {"max_seq_len": 7},
        {"max_queue_len": -1},
        {"prefill_chunk_len": 0},
        {"max_draft_len": 64},
        {"queue_timeout_ms": 0.0},
        {"busy_prefill_ms": math.nan},
    ],
)
def test_refuses_engine_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        EngineConfig(**values)


def test_the_edges_of_the_ranges_are_allowed() -> None:
    EngineConfig(num_slots=64, max_seq_len=8, max_queue_len=0, prefill_chunk_len=1, max_draft_len=0)
    RopeConfig(scaling="yarn", original_max_seq_len=1, factor=1.0)
