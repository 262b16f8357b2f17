from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from albor_serve.model import Decoder, KVCache
from albor_train.fused import FusedDecoder, by_original_name
from albor_train.spec import Spec, load_spec
from albor_train.train import initial_weights
from tests.train.fixtures_train import write_tiny_spec


def decoders(spec: Spec) -> list[Decoder]:
    config = spec.model_config
    return [Decoder(config), FusedDecoder(config), FusedDecoder(config, own_kernels=True)]


@pytest.fixture(params=["qwen3", "qwen2", "llama"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> Spec:
    spec = load_spec(write_tiny_spec(tmp_path))
    model = dataclasses.replace(spec.model, architecture=request.param)
    return dataclasses.replace(spec, model=model)


def filled(spec: Spec) -> list[Decoder]:
    """All kinds of decoders with the same weights, none of them zero."""
    train = dataclasses.replace(spec.train, zero_init_outputs=False, init_std=0.1)
    weights = initial_weights(spec.model_config, train, 3)
    for name, weight in weights.items():
        if weight.dim() == 1:
            weight.add_(torch.linspace(-0.5, 0.5, len(weight)) * (1 + len(name) % 3))
    models = decoders(spec)
    for model in models:
        views = by_original_name(dict(model.named_parameters()), spec.model_config)
        assert {name: view.shape for name, view in views.items()} == {
            name: weight.shape for name, weight in weights.items()
        }
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(weights[name])
    return models


def test_hidden_states_and_gradients_are_the_decoders(spec: Spec) -> None:
    tokens = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for model in filled(spec):
        hidden = model.hidden(tokens)
        hidden.square().mean().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients = by_original_name(
            {name: gradient for name, gradient in found.items() if gradient is not None},
            spec.model_config,
        )
        results.append((hidden, gradients))
    expected, wanted = results[0]
    assert len(results) == 3
    for hidden, gradients in results[1:]:
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert float(gradient.abs().max()) > 0, name
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_rotations_at_hand_change_nothing(spec: Spec) -> None:
    plain, *_ = filled(spec)
    tokens = torch.arange(20)[None]
    rotations = plain.rotations(torch.arange(20), plain.model.embed_tokens.weight)
    assert torch.equal(plain.hidden(tokens), plain.hidden(tokens, rotations=rotations))


def test_a_cache_is_refused(spec: Spec) -> None:
    _, fused, _ = filled(spec)
    with pytest.raises(ValueError, match="without a cache"):
        fused.hidden(torch.arange(4)[None], cache=KVCache.empty(spec.model_config, 8))
