"""LoRA adapters: what they compute, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from albor_serve.backends.base import ExtendStep
from albor_serve.backends.torch_ref import TorchReferenceBackend
from albor_serve.checkpoint import open_gguf_checkpoint
from albor_serve.checkpoint.lora import LoraAdapter, adapter_gguf, parse_adapter
from albor_serve.config import Architecture, ModelConfig
from albor_serve.errors import AlborError, ConfigError, UnsupportedModelError
from albor_serve.loader import LoadOptions, load_model, open_backend
from tests.fixtures_tiny import (
    ARCHITECTURES,
    Weights,
    random_tokens,
    reader,
    save_gguf,
    save_hf_weights,
    tiny_model,
)

RANK, ALPHA = 4, 6.0


def save_peft(folder: Path, weights: Weights, seed: int = 0, **settings: Any) -> Weights:
    """Write a random adapter for all layers' matrices; returns what it adds to the weights."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    scale = ALPHA / (RANK**0.5 if settings.get("use_rslora") else RANK)
    tensors, added = {}, {}
    for name, matrix in weights.items():
        if matrix.ndim != 2 or "layers" not in name:
            continue
        a = rng.normal(0, 0.2, (RANK, matrix.shape[1])).astype(np.float32)
        b = rng.normal(0, 0.2, (matrix.shape[0], RANK)).astype(np.float32)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = a
        tensors[f"{stem}.lora_B.weight"] = b
        added[name] = (scale * b @ a).astype(np.float32)
    save_hf_weights(folder / "adapter_model.safetensors", tensors)
    return added


def reference(config: ModelConfig, weights: Weights, tokens: list[int]) -> np.ndarray:
    backend = TorchReferenceBackend(config, reader(weights), 1, len(tokens))
    return backend.extend([ExtendStep(0, tuple(tokens), "all")])[0]


def with_adapters(path: Path, adapters: list[LoraAdapter], tokens: list[int]) -> np.ndarray:
    opened = open_backend(open_gguf_checkpoint(path), 1, 64, num_threads=1, adapters=adapters)
    try:
        return opened.backend.extend([ExtendStep(0, tuple(tokens), "all")])[0].copy()
    finally:
        opened.backend.close()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_are_those_of_merged_weights(
    tmp_path: Path, arch: Architecture, rslora: bool
) -> None:
    config, weights = tiny_model(arch, seed=5, max_seq_len=64)
    path = save_gguf(tmp_path / "m.gguf", config, weights, file_type="F32")
    added = save_peft(tmp_path / "lora", weights, use_rslora=rslora)
    tokens = random_tokens(config, 24)
    got = with_adapters(path, [LoraAdapter(tmp_path / "lora", 0.5)], tokens)
    merged = {name: w + 0.5 * added.get(name, np.float32(0)) for name, w in weights.items()}
    want = reference(config, merged, tokens)
    plain = reference(config, weights, tokens)
    # The cache holds F16 keys and values.
    assert np.abs(got - want).max() < 3e-2
    assert np.abs(plain - want).max() > 0.5, "the adapter must matter"


def test_two_adapters_add_up_and_a_gguf_file_is_taken(tmp_path: Path) -> None:
    config, weights = tiny_model("llama", seed=5, max_seq_len=64)
    path = save_gguf(tmp_path / "m.gguf", config, weights, file_type="F32")
    first = save_peft(tmp_path / "one", weights, seed=1)
    second = save_peft(tmp_path / "two", weights, seed=2)
    kept = tmp_path / "one.gguf"
    with adapter_gguf(tmp_path / "one", config) as made:
        kept.write_bytes(made.read_bytes())
    assert not made.exists()
    tokens = random_tokens(config, 24)
    adapters = [LoraAdapter(kept, -0.5), LoraAdapter(tmp_path / "two", 0.25)]
    got = with_adapters(path, adapters, tokens)
    zero = np.float32(0)
    merged = {
        name: w - 0.5 * first.get(name, zero) + 0.25 * second.get(name, zero)
        for name, w in weights.items()
    }
    assert np.abs(got - reference(config, merged, tokens)).max() < 3e-2


def test_a_served_model_says_that_it_has_an_adapter(tmp_path: Path) -> None:
    config, weights = tiny_model("qwen3", seed=5, max_seq_len=64)
    path = save_gguf(tmp_path / "m.gguf", config, weights)
    save_peft(tmp_path / "lora", weights)
    options = LoadOptions(num_slots=1, adapters=(LoraAdapter(tmp_path / "lora"),))
    loaded = load_model(path, options)
    try:
        assert loaded.engine.backend.info.name == "llamacpp"
        assert loaded.description.endswith("1 LoRA adapter")
    finally:
        loaded.engine.close()
    with pytest.raises(ConfigError):
        load_model(path, LoadOptions(num_slots=1, backend="cpu", adapters=options.adapters))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"modules_to_save": ["lm_head"]},
        {"alpha_pattern": {"q_proj": 3}},
    ],
)
def test_more_than_plain_lora_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    config, weights = tiny_model("qwen3", max_seq_len=64)
    save_peft(tmp_path / "lora", weights, **settings)
    with pytest.raises(UnsupportedModelError), adapter_gguf(tmp_path / "lora", config):
        pass


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config, weights = tiny_model("qwen3", max_seq_len=64)
    path = save_gguf(tmp_path / "m.gguf", config, weights)
    other_config, other = tiny_model("qwen3", max_seq_len=64, hidden_size=96)
    save_peft(tmp_path / "other", other)
    with adapter_gguf(tmp_path / "other", other_config) as made:
        (tmp_path / "other.gguf").write_bytes(made.read_bytes())
    (tmp_path / "empty").mkdir()
    for bad in (
        tmp_path / "other",
        tmp_path / "other.gguf",
        tmp_path / "empty",
        tmp_path / "missing.gguf",
        path,
    ):
        with pytest.raises(AlborError) as caught:
            with_adapters(path, [LoraAdapter(bad)], [1])
        assert "\n" not in str(caught.value)


def test_scales_on_the_command_line(tmp_path: Path) -> None:
    assert parse_adapter("a.gguf") == LoraAdapter(Path("a.gguf"), 1.0)
    assert parse_adapter("a=b.gguf=0.5") == LoraAdapter(Path("a=b.gguf"), 0.5)
    odd = tmp_path / "a=1"
    odd.touch()
    assert parse_adapter(str(odd)) == LoraAdapter(odd)
    for text in ("a=x", "a=nan", "a=inf", "=1", "a="):
        with pytest.raises(ConfigError):
            parse_adapter(text)
