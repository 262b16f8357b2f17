from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from albor_train import ladder
from albor_train.data import build_corpus, build_held_out
from albor_train.errors import DataError
from albor_train.ladder import reproduce, tiny
from albor_train.runs import read_log
from albor_train.serving import serves
from albor_train.spec import Spec, load_spec
from albor_train.world import World
from tests.train.fixtures_train import tiny_spec_dict, write_tiny_spec

ALONE = World(0, 1, torch.device("cpu"))


def small_spec(folder: Path, **train: Any) -> Spec:
    raw = copy.deepcopy(tiny_spec_dict())
    raw["train"].update(train)  # type: ignore[attr-defined]
    raw["evaluate"] = {"held_out_tokens": 2000, "fim_examples": 2, "benchmarks": []}
    return load_spec(write_tiny_spec(folder, raw))


def files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_the_whole_path_survives_an_interruption_and_is_not_walked_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec(tmp_path, steps=8, warmup_steps=1, checkpoint_every=3)
    work = tmp_path / "work"
    real_train = ladder.train

    def interrupted(*args: Any, **options: Any) -> Any:
        real_train(*args, **{**options, "stop_after": 5})
        raise KeyboardInterrupt

    monkeypatch.setattr(ladder, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce(spec, work, world=ALONE, processes=1)
    monkeypatch.setattr(ladder, "train", real_train)

    def broken(_: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(ladder, "serves", broken)
    with pytest.raises(KeyboardInterrupt):
        reproduce(spec, work, world=ALONE, processes=1)
    assert not list(work.glob("scores-*"))
    monkeypatch.setattr(ladder, "serves", serves)

    said: list[str] = []
    scores = reproduce(spec, work, world=ALONE, processes=1, say=said.append)
    assert any(line.startswith("albor-serve answers") for line in said)
    assert scores["q4 perplexity ratio"] < 1.05
    assert 0 < scores["held-out bits_per_byte"] < 8
    (run,) = work.glob("run-*")
    steps = [line["step"] for line in read_log(run / "log.jsonl") if line["event"] == "step"]
    assert steps == list(range(8))

    before = files(work)
    said.clear()
    assert reproduce(spec, work, world=ALONE, processes=1, say=said.append) == scores
    assert files(work) == before
    assert said[-1].endswith("as before")


def test_changed_sources_make_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder's text is no part of the spec, but its run must not be taken up again."""
    spec, work = small_spec(tmp_path), tmp_path / "work"
    runs: list[Path] = []

    def noted(*args: Any, **_: Any) -> Any:
        runs.append(args[3])
        raise KeyboardInterrupt

    monkeypatch.setattr(ladder, "train", noted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reproduce(spec, work, world=ALONE, processes=1)
        source = tmp_path / "alpha/pkg0/module_0.py"
        source.write_text(source.read_text() + "\nlast_line = 1\n")
    assert runs[0] != runs[1]


def test_held_out_text_alone_is_the_corpus_own(tmp_path: Path) -> None:
    spec = small_spec(tmp_path)
    whole = build_corpus(spec, tmp_path / "work")
    alone = build_held_out(spec, tmp_path / "work")
    name = "validation.jsonl.gz"
    assert (alone.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert alone.report["train"] == {}
    assert list(alone.report["projects"]) == ["beta"]


def test_nothing_held_out_is_an_error(tmp_path: Path) -> None:
    spec = small_spec(tmp_path)
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, held_out=()))
    with pytest.raises(DataError, match="validation"):
        build_held_out(spec, tmp_path / "work")


def test_tiny_keeps_the_rules_and_needs_no_network() -> None:
    spec = load_spec(Path(__file__).parents[2] / "specs/stdlib.yaml")
    small = tiny(spec)
    assert small.data.filters == spec.data.filters
    assert not small.data.lock
    assert small.model_config.num_parameters < 2_000_000
    text = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(small.train))))
    assert "steps: 100" in text
