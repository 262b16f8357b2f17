"""The decoder against transformers, and its cache against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from albor_serve.config import Architecture, ModelConfig
from albor_serve.errors import CheckpointError
from albor_serve.model import Decoder, KVCache, load_decoder
from tests.fixtures_tiny import (
    ARCHITECTURES,
    ROPE_SCALINGS,
    Weights,
    random_tokens,
    reader,
    save_hf_folder,
    tiny_model,
)

TOLERANCE = 1e-4  # fp32; the logits have a standard deviation of 2


def peer_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model.eval()(tokens).logits


def assert_equals_peer(tmp_path: Path, config: ModelConfig, weights: Weights) -> None:
    tokens = torch.tensor([random_tokens(config, 200, seed=s) for s in (1, 2)])
    expected = peer_logits(save_hf_folder(tmp_path / "model", config, weights), tokens)
    with torch.inference_mode():
        ours = load_decoder(config, reader(weights))(tokens)
    assert (ours - expected).abs().max().item() <= TOLERANCE
    assert expected.std() > 0.5  # otherwise the tolerance proves nothing


@pytest.mark.parametrize("rope", ROPE_SCALINGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_equal_transformers(arch: Architecture, rope: str, tmp_path: Path) -> None:
    config, weights = tiny_model(arch, seed=3, rope=ROPE_SCALINGS[rope])
    assert_equals_peer(tmp_path, config, weights)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tied_and_untied_heads_equal_transformers(
    arch: Architecture, tied: bool, tmp_path: Path
) -> None:
    config, weights = tiny_model(arch, seed=4, tie_embeddings=tied, num_kv_heads=4)
    assert_equals_peer(tmp_path, config, weights)


@pytest.mark.parametrize("scaling", [name for name in ROPE_SCALINGS if name != "none"])
def test_rope_scaling_changes_the_logits(scaling: str) -> None:
    config, weights = tiny_model("llama", seed=3)
    scaled, _ = tiny_model("llama", seed=3, rope=ROPE_SCALINGS[scaling])
    tokens = torch.tensor([random_tokens(config, 100)])
    plain_logits = load_decoder(config, reader(weights))(tokens)
    scaled_logits = load_decoder(scaled, reader(weights))(tokens)
    assert (plain_logits - scaled_logits).abs().max() > 0.1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cache_gives_the_logits_of_a_call_without_one(arch: Architecture) -> None:
    config, weights = tiny_model(arch, seed=5)
    model = load_decoder(config, reader(weights))
    tokens = torch.tensor([random_tokens(config, 40)])
    whole = model(tokens)
    cache = KVCache.empty(config, 64)
    parts = [model(part, cache=cache) for part in tokens.split([1, 7, 20, 1, 11], dim=1)]
    assert cache.length == 40
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5
    cache.length = 10
    again = model(tokens[:, 10:], cache=cache)
    assert (again - whole[:, 10:]).abs().max() < 1e-5


def test_positions_can_be_given() -> None:
    config, weights = tiny_model("qwen3")
    model = load_decoder(config, reader(weights))
    tokens = torch.tensor([random_tokens(config, 12)] * 2)
    default = model(tokens)
    shifted = model(tokens, torch.stack((torch.arange(12), torch.arange(12) + 5)))
    # Rotary attention sees distances only, so a shift of the whole sequence changes nothing.
    assert (shifted - default).abs().max() < 1e-4
    stretched = model(tokens, 2 * torch.arange(12))
    assert (stretched - default).abs().max() > 0.1


def test_every_parameter_gets_a_gradient_and_a_call_changes_nothing() -> None:
    config, _ = tiny_model("qwen2")
    torch.manual_seed(0)
    model = Decoder(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.tensor([random_tokens(config, 20)])
    model(tokens).logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter, before[name]), name


def test_state_dict_has_the_names_of_the_checkpoint() -> None:
    for arch in ARCHITECTURES:
        config, weights = tiny_model(arch)
        with torch.device("meta"):
            assert set(Decoder(config).state_dict()) == set(weights)


def test_wrong_shape_is_named() -> None:
    config, weights = tiny_model("llama")
    weights["model.norm.weight"] = np.ones(3, dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[3\].*\[64\]"):
        load_decoder(config, reader(weights))


def test_too_many_tokens_for_the_cache() -> None:
    config, weights = tiny_model("llama")
    model = load_decoder(config, reader(weights))
    cache = KVCache.empty(config, 8)
    with pytest.raises(ValueError, match="9 tokens in a cache of 8"):
        model(torch.zeros(1, 9, dtype=torch.int64), cache=cache)
    assert cache.length == 0
