"""What only a GPU can show of training: the same files and rules as test_train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from albor_train.runs import latest_checkpoint
from albor_train.train import Trainer
from albor_train.world import World
from tests.train.test_train import Prepared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

GPU = World(0, 1, torch.device("cuda"))
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "compile": True,
    "attention": "document_varlen",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def trainer(prepared: Prepared, run: Path, **train: Any) -> Trainer:
    spec = prepared.spec(**{**SETTINGS, **train})
    return Trainer(spec, prepared.stream, prepared.tokens.folder, run, GPU)


@pytest.mark.usefixtures("deterministic")
def test_a_resumed_run_goes_on_with_the_same_losses(prepared: Prepared, tmp_path: Path) -> None:
    whole = trainer(prepared, tmp_path / "whole").run()
    first = trainer(prepared, tmp_path / "parts").run(stop_after=7)
    assert latest_checkpoint(tmp_path / "parts") is not None
    rest = trainer(prepared, tmp_path / "parts").run()
    assert [r.loss for r in first + rest] == [r.loss for r in whole]


@pytest.mark.usefixtures("deterministic")
def test_two_runs_are_equal_to_the_bit(prepared: Prepared, tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        run = trainer(prepared, tmp_path / name)
        run.run(stop_after=10)
        weights.append(run.weights)
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "document_mask"},
        {"attention": "document_flex"},
        {"fused_projections": True},
        {"fused_projections": True, "own_kernels": True},
        {"compile": False},
    ],
)
def test_variants_learn_the_same(
    prepared: Prepared, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Losses in bfloat16, so within what its rounding does in twenty steps."""
    expected = trainer(prepared, tmp_path / "plain").run()
    records = trainer(prepared, tmp_path / "changed", **change).run()
    assert [r.loss for r in records] == pytest.approx([r.loss for r in expected], rel=0.02)
    assert expected[-1].loss < expected[0].loss
