from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from albor_train.errors import SpecError
from albor_train.spec import check_epochs, load_spec
from tests.train.fixtures_train import tiny_spec_dict

SPECS = Path(__file__).parents[2] / "specs"


def load(tmp_path: Path, change: dict[str, Any]) -> Any:
    raw: dict[str, Any] = copy.deepcopy(tiny_spec_dict())
    for part, value in change.items():
        if isinstance(value, dict):
            raw[part].update(value)
        else:
            raw[part] = value
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_spec(path)


@pytest.mark.parametrize(
    "path", sorted(p for p in SPECS.glob("*.yaml") if "lock" not in p.name), ids=lambda p: p.stem
)
def test_committed_specs_load(path: Path) -> None:
    spec = load_spec(path)
    assert spec.name == path.stem
    if path.stem != "albor-350m":
        # What ships inside the package.
        assert spec.model_config.num_parameters * 4.5 / 8 < 100e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"step": 5}}, "unknown field 'step'"),
        ({"train": {"steps": "many"}}, "type int"),
        ({"train": {"steps": True}}, "type int"),
        ({"train": {"steps": 0}}, "must be positive"),
        ({"train": {"lr": float("nan")}}, "type float"),
        ({"train": {"schedule": "linear"}}, "wsd, cosine"),
        ({"train": {"warmup_steps": 3}}, "tenth"),
        ({"train": {"horizon": 5000}}, "schedule must end where the run ends"),
        ({"train": {"own_kernels": True}}, "train.own_kernels is true: it needs fused_projections"),
        ({"train": {"fp8": True}}, "train.fp8 is true: it needs fused_projections"),
        ({"train": {"sdpa": "flash"}}, "who computes causal attention"),
        ({"train": {"batch_tokens": 1000}}, "multiple"),
        ({"train": {"sequence_len": 512}}, "max_seq_len"),
        ({"train": {"decay_share": 1.0}}, "before the warm-up"),
        ({"tokenizer": {"vocab_size": 100_000}}, "16 bits"),
        ({"fim": {"rate": 1.5}}, "0 to 1"),
        ({"fim": {"spans": {"rest_of_line": 0}}}, "no positive weight"),
        ({"data": {"folders": []}}, "nothing to train on"),
        ({"model": {"num_kv_heads": 3}}, "multiple"),
        ({"name": "../up"}, "folder"),
        ({"folder": "/"}, "unknown field"),
    ],
)
def test_specs_that_cannot_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from albor_serve.errors import ConfigError

    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\x00"])
def test_files_that_are_no_spec(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError):
        load_spec(path)


def test_missing_field_is_named(tmp_path: Path) -> None:
    raw: dict[str, Any] = copy.deepcopy(tiny_spec_dict())
    del raw["train"]["epochs"]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(SpecError, match="'epochs' is missing"):
        load_spec(tmp_path / "s.yaml")


def test_hash_covers_every_part_but_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = load(tmp_path / "a", {}), load(tmp_path / "b", {})
    assert first.hash == second.hash
    hashes = {first.hash}
    for change in ({"seed": 1}, {"train": {"lr": 1e-3}}, {"fim": {"rate": 0.1}}, {"name": "x"}):
        hashes.add(load(tmp_path, change).hash)
    assert len(hashes) == 5


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    raw = yaml.safe_dump(tiny_spec_dict()).replace("lr: 0.005", "lr: 5e-3")
    (tmp_path / "s.yaml").write_text(raw)
    assert load_spec(tmp_path / "s.yaml").train.lr == 0.005


def test_data_must_last(tmp_path: Path) -> None:
    spec = load(tmp_path, {"train": {"steps": 20, "epochs": 2}})
    check_epochs(spec.train, 40)
    with pytest.raises(SpecError, match="only 19 steps"):
        check_epochs(spec.train, 39)
