from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from albor_serve.model import Decoder
from albor_train.attention import attention_for, document_ids, prepare_mask
from albor_train.loss import chunked_cross_entropy
from albor_train.plan import estimate_memory, plan_lines
from albor_train.spec import load_spec
from albor_train.train import initial_weights
from tests.train.fixtures_train import write_tiny_spec


@pytest.mark.parametrize("rows", [2, 8])
def test_activations_are_not_more_than_estimated(tmp_path: Path, rows: int) -> None:
    spec = load_spec(write_tiny_spec(tmp_path))
    config = spec.model_config
    model = Decoder(config)
    model.load_state_dict(initial_weights(config, spec.train, 0))
    tokens = torch.randint(16, 512, (rows, 256))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = prepare_mask("document_mask", document_ids(tokens, 0, 4), torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(tokens, attend=attention_for("document_mask", mask))
        head = model.model.embed_tokens.weight
        chunked_cross_entropy(hidden.flatten(0, 1), head, tokens.flatten(), 128).backward()
    import dataclasses

    train = dataclasses.replace(spec.train, micro_batch_rows=rows)
    estimate = estimate_memory(config, train)
    measured = sum(kept.values())
    assert measured <= estimate.activations + estimate.loss
    assert measured > 0.3 * estimate.activations


def test_plan_needs_no_data_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_spec(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the plan must not start programs")

    monkeypatch.setattr("subprocess.run", forbidden)
    text = "\n".join(plan_lines(load_spec(path)))
    assert sorted(tmp_path.rglob("*")) == before
    assert "115,968 parameters" in text or "parameters" in text
    assert "memory" in text


def test_plan_of_the_committed_spec() -> None:
    spec = load_spec(Path(__file__).parents[2] / "specs/albor-125m.yaml")
    text = "\n".join(plan_lines(spec))
    assert f"{spec.model_config.num_parameters:,} parameters" in text
    assert "270 pinned packages" in text
