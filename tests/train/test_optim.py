from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albor_train.errors import DivergedError
from albor_train.optim import (
    GradientClipper,
    Optimizer,
    global_norm,
    learning_rate,
    orthogonalize,
)
from albor_train.spec import TrainSpec

TRAIN = TrainSpec(steps=1000, epochs=1, batch_tokens=1024, micro_batch_rows=1, warmup_steps=50)


def test_wsd_rises_stays_and_falls_to_zero_at_the_end() -> None:
    rates = [learning_rate(TRAIN, step) for step in range(1000)]
    assert rates[0] == pytest.approx(TRAIN.lr / 50)
    assert rates[49] == rates[50] == rates[449] == TRAIN.lr
    assert all(a > b for a, b in itertools.pairwise(rates[450:]))
    assert rates[-1] < 0.005 * TRAIN.lr


def test_cosine_is_half_at_its_middle_and_ends_at_the_horizon() -> None:
    train = dataclasses.replace(TRAIN, schedule="cosine", final_lr_share=0.0)
    assert learning_rate(train, 525) == pytest.approx(train.lr / 2)
    assert learning_rate(train, 999) < 0.05 * train.lr
    rates = [learning_rate(train, step) for step in range(50, 1000)]
    assert rates == sorted(rates, reverse=True)


def test_orthogonalize_evens_out_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((3, 32, 64), (2, 64, 32), (1, 48, 48)):
        x = torch.randn(shape)
        values = torch.linalg.svdvals(orthogonalize(x))
        assert values.max() < 1.3
        assert values.mean() > 0.7
        # The singular directions stay: U^T X V of the polar factor has a positive diagonal.
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        inner = torch.diagonal(u.mT @ orthogonalize(x) @ vh.mT, dim1=1, dim2=2)
        assert inner.min() > 0


def test_adamw_is_torchs() -> None:
    torch.manual_seed(1)
    train = dataclasses.replace(TRAIN, optimizer="adamw", weight_decay=0.3)
    start = torch.randn(7, 5)
    ours = {"model.layers.0.w": start.clone()}
    optimizer = Optimizer(ours, train)
    theirs = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    for step in range(10):
        gradient = torch.randn(7, 5)
        optimizer.step({"model.layers.0.w": gradient}, step, 1e-2)
        theirs.grad = gradient
        reference.step()
    torch.testing.assert_close(ours["model.layers.0.w"], theirs.detach(), rtol=1e-5, atol=1e-6)


def test_muon_is_torchs() -> None:
    torch.manual_seed(2)
    names = [f"model.layers.{i}.w" for i in range(3)]
    start = {name: torch.randn(24, 16) for name in names}
    ours = {name: tensor.clone() for name, tensor in start.items()}
    optimizer = Optimizer(ours, TRAIN)
    theirs = [torch.nn.Parameter(start[name].clone()) for name in names]
    reference = torch.optim.Muon(
        theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        gradients = {name: torch.randn(24, 16) for name in names}
        optimizer.step(gradients, step, 1e-2)
        for parameter, name in zip(theirs, names, strict=True):
            parameter.grad = gradients[name].clone()
        reference.step()
    for parameter, name in zip(theirs, names, strict=True):
        # torch iterates in bfloat16, we in float32 on a CPU.
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=0.05, atol=2e-3)


def test_embeddings_and_norms_never_go_to_muon() -> None:
    parameters = {
        "model.embed_tokens.weight": torch.zeros(8, 4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4),
        "model.layers.0.input_layernorm.weight": torch.zeros(4),
    }
    kinds = {name.split(".", 1)[0] for name in Optimizer(parameters, TRAIN).moments}
    assert kinds == {"momentum", "mean", "square"}
    assert "momentum.model.embed_tokens.weight" not in Optimizer(parameters, TRAIN).moments


def test_global_norm_is_the_norm_of_all_numbers() -> None:
    torch.manual_seed(3)
    gradients = {"a": torch.randn(4, 5), "b": torch.randn(9)}
    flat = torch.cat([g.flatten() for g in gradients.values()])
    assert float(global_norm(gradients)) == pytest.approx(float(flat.norm()), rel=1e-6)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_clipped_norm_is_bounded(norms: list[float]) -> None:
    clipper = GradientClipper(max_norm=1.0, z_limit=2.5)
    for norm in norms:
        target = clipper.target_norm(norm)
        assert 0 <= target <= 1.0
        assert target <= norm


def test_zclip_pulls_back_a_spike_and_leaves_the_rest() -> None:
    clipper = GradientClipper(max_norm=1e9, z_limit=2.5)
    rng = random.Random(0)
    for _ in range(200):
        clipper.target_norm(1.0 + 0.1 * rng.uniform(-1, 1))
    assert clipper.target_norm(1.05) == 1.05
    assert 0.9 < clipper.target_norm(50.0) < 1.3
    assert clipper.mean == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_stops(norm: float) -> None:
    with pytest.raises(DivergedError):
        GradientClipper(1.0, 2.5).target_norm(norm)
