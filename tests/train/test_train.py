from __future__ import annotations

import copy
import dataclasses
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from albor_train.artefact import Artefact
from albor_train.batches import RowStream
from albor_train.data import build_corpus
from albor_train.errors import DataError, DivergedError, TrainingError
from albor_train.optim import global_norm
from albor_train.pack import build_pack, build_tokenizer, build_tokens, open_pack
from albor_train.runs import latest_checkpoint, read_log
from albor_train.spec import Spec, load_spec
from albor_train.train import Trainer
from albor_train.world import World
from tests.train.fixtures_train import tiny_spec_dict, write_tiny_spec

ALONE = World(0, 1, torch.device("cpu"))


class Prepared:
    """A tiny corpus, tokenized and packed once for all tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec_path = write_tiny_spec(folder)
        spec = load_spec(self.spec_path)
        self.work = folder / "work"
        corpus = build_corpus(spec, self.work)
        tokenizer = build_tokenizer(spec, corpus, self.work)
        self.tokens: Artefact = build_tokens(corpus, tokenizer, self.work, max_shard_bytes=1 << 20)
        self.stream = RowStream(
            [open_pack(build_pack(spec, self.tokens, self.work, epoch=e)) for e in range(4)]
        )
        self.validation = RowStream(
            [open_pack(build_pack(spec, self.tokens, self.work, split="validation"))]
        )

    def spec(self, **train: Any) -> Spec:
        raw = copy.deepcopy(tiny_spec_dict())
        raw["train"].update(train)  # type: ignore[attr-defined]
        path = self.folder / "variant.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_spec(path)

    def trainer(self, spec: Spec, run: Path, **options: Any) -> Trainer:
        return Trainer(spec, self.stream, self.tokens.folder, run, ALONE, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    torch.set_num_threads(1)
    return Prepared(tmp_path_factory.mktemp("train"))


def bits(trainer: Trainer) -> bytes:
    return b"".join(t.numpy().tobytes() for t in trainer.weights.values())


def test_falsify_001_loss_falls_and_never_rises_for_long(
    prepared: Prepared, tmp_path: Path
) -> None:
    spec = prepared.spec(steps=45, warmup_steps=4, checkpoint_every=45)
    records = prepared.trainer(spec, tmp_path).run()
    losses = [record.loss for record in records]
    mean, means = losses[0], []
    for loss in losses:
        mean += 0.1 * (loss - mean)
        means.append(mean)
    assert losses[-1] < 0.7 * losses[0]
    after = means[10:]
    for i in range(len(after) - 10):
        assert after[i + 10] < 1.05 * after[i]


def test_falsify_002_clipped_norms_are_bounded(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = prepared.spec(steps=20, max_grad_norm=0.3, lr=0.02)
    trainer = prepared.trainer(spec, tmp_path)
    norms: list[float] = []
    step = trainer.optimizer.step

    def measured(gradients: Any, *rest: Any) -> None:
        norms.append(float(global_norm(gradients)))
        step(gradients, *rest)

    monkeypatch.setattr(trainer.optimizer, "step", measured)
    records = trainer.run()
    assert any(record.grad_norm > 0.3 for record in records)
    # What the optimizer gets is what the record says.
    assert all(norm <= 0.3 * (1 + 1e-5) for norm in norms)
    assert [record.clipped_norm for record in records] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_falsify_003_two_runs_are_equal_to_the_bit(
    prepared: Prepared, tmp_path: Path, optimizer: str
) -> None:
    spec = prepared.spec(steps=10, warmup_steps=1, optimizer=optimizer)
    runs = []
    for name in ("a", "b"):
        trainer = prepared.trainer(spec, tmp_path / name)
        trainer.run()
        runs.append(bits(trainer))
    assert runs[0] == runs[1]


def test_every_gradient_is_nonzero_after_the_first_step(prepared: Prepared, tmp_path: Path) -> None:
    trainer = prepared.trainer(prepared.spec(), tmp_path)
    trainer.run(stop_after=1)
    trainer.backward(1)
    for name, gradient in trainer.gradients.items():
        assert float(gradient.abs().max()) > 0, name
    assert set(trainer.gradients) == set(trainer.weights)


def test_five_random_stops_change_nothing(prepared: Prepared, tmp_path: Path) -> None:
    spec = prepared.spec(steps=12, warmup_steps=1, ema=0.9)
    whole = prepared.trainer(spec, tmp_path / "whole")
    expected = whole.run()
    rng = random.Random(7)
    stops = sorted(rng.sample(range(1, 12), 5))
    records = []
    done = 0
    for stop in [*stops, 12]:
        trainer = prepared.trainer(spec, tmp_path / "parts")
        assert trainer.step == done
        records += trainer.run(stop_after=stop - done)
        done = stop
    assert bits(trainer) == bits(whole)
    assert [r.loss for r in records] == [r.loss for r in expected]
    assert [r.lr for r in records] == [r.lr for r in expected]
    for name, average in whole.ema.items():
        assert torch.equal(average, trainer.ema[name])
    log = [line for line in read_log(tmp_path / "parts/log.jsonl") if line["event"] == "step"]
    assert [line["step"] for line in log] == list(range(12))


def test_gradients_do_not_depend_on_how_a_batch_is_cut(prepared: Prepared, tmp_path: Path) -> None:
    results = []
    for rows in (1, 2, 4):
        trainer = prepared.trainer(prepared.spec(micro_batch_rows=rows), tmp_path / str(rows))
        loss, count = trainer.backward(0)
        results.append((loss, count, {k: v.clone() for k, v in trainer.gradients.items()}))
    for loss, count, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert count == results[0][1]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][2][name], rtol=1e-4, atol=1e-6)


def test_fused_projections_train_the_same_matrices(prepared: Prepared, tmp_path: Path) -> None:
    plain = prepared.trainer(prepared.spec(steps=10, warmup_steps=1), tmp_path / "plain")
    fused = prepared.trainer(
        prepared.spec(steps=10, warmup_steps=1, fused_projections=True), tmp_path / "fused"
    )
    expected, records = plain.run(), fused.run()
    assert [r.loss for r in records] == pytest.approx([r.loss for r in expected], rel=1e-4)
    assert fused.optimizer.moments.keys() == plain.optimizer.moments.keys()
    saved = [latest_checkpoint(tmp_path / name) for name in ("plain", "fused")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / file) for folder in saved if folder is not None)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-4)
    resumed = prepared.trainer(
        prepared.spec(steps=10, warmup_steps=1, fused_projections=True), tmp_path / "fused"
    )
    assert bits(resumed) == bits(fused)


def test_not_a_number_stops_and_saves_nothing(prepared: Prepared, tmp_path: Path) -> None:
    trainer = prepared.trainer(prepared.spec(), tmp_path)
    trainer.run(stop_after=3)
    before = latest_checkpoint(tmp_path)
    trainer.weights["model.norm.weight"][0] = float("nan")
    trainer._publish()
    with pytest.raises(DivergedError):
        trainer.run()
    assert latest_checkpoint(tmp_path) == before
    assert read_log(tmp_path / "log.jsonl")[-1]["event"] == "stopped"


def test_a_lasting_spike_stops(prepared: Prepared, tmp_path: Path) -> None:
    trainer = prepared.trainer(prepared.spec(spike_factor=1.2, spike_patience=2), tmp_path)
    trainer.run(stop_after=5)
    trainer._loss_mean = 0.5
    with pytest.raises(DivergedError, match="mean"):
        trainer.run()


def test_a_checkpoint_loads_in_transformers(prepared: Prepared, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trainer = prepared.trainer(prepared.spec(), tmp_path)
    trainer.run(stop_after=2)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(16, 512, (2, 17))
    with torch.no_grad():
        theirs = model(tokens).logits
        ours = trainer._model(tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "state.json").read_text())["rows_used"] == 2 * 4


def test_other_spec_and_other_data_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    prepared.trainer(prepared.spec(), tmp_path).run(stop_after=1)
    with pytest.raises(TrainingError, match="another spec"):
        prepared.trainer(prepared.spec(lr=1e-3), tmp_path)
    stream = RowStream(prepared.stream.packs[1:])
    with pytest.raises(TrainingError, match="other data"):
        Trainer(prepared.spec(), stream, prepared.tokens.folder, tmp_path, ALONE)


def test_rows_that_run_out_are_an_error(prepared: Prepared, tmp_path: Path) -> None:
    stream = RowStream(prepared.stream.packs[:1])
    spec = prepared.spec(steps=1000)
    trainer = Trainer(spec, stream, prepared.tokens.folder, tmp_path, ALONE)
    trainer.step = len(stream) // 4
    with pytest.raises(DataError, match="another epoch"):
        trainer.run()


def test_validation_falls(prepared: Prepared, tmp_path: Path) -> None:
    spec = prepared.spec(steps=24, warmup_steps=2, validate_every=12)
    trainer = prepared.trainer(spec, tmp_path, validation={"held_out": prepared.validation})
    trainer.run()
    losses = [e["held_out"] for e in read_log(tmp_path / "log.jsonl") if e["event"] == "validation"]
    assert len(losses) == 2
    assert losses[1] < losses[0] < np.log(512) + 0.1


def test_packs_may_come_while_training(prepared: Prepared, tmp_path: Path) -> None:
    spec = prepared.spec(steps=10, warmup_steps=1)
    packs = [
        dataclasses.replace(pack, rows=pack.rows[:11], key=f"{pack.key}-cut")
        for pack in prepared.stream.packs
    ]
    tokenizer = prepared.tokens.folder
    whole = Trainer(spec, RowStream(packs), tokenizer, tmp_path / "whole", ALONE)
    whole.run()
    stream = RowStream(packs[:1], is_open=True)

    def append() -> None:
        for pack in packs[1:]:
            time.sleep(0.1)
            stream.append(pack)
        stream.finish()

    threading.Thread(target=append).start()
    trainer = Trainer(spec, stream, tokenizer, tmp_path / "fed", ALONE)
    trainer.run()
    assert bits(trainer) == bits(whole)


def test_failed_packing_ends_the_run(prepared: Prepared, tmp_path: Path) -> None:
    spec = prepared.spec(steps=20, batch_tokens=4096, micro_batch_rows=4)
    stream = RowStream(prepared.stream.packs[:1], is_open=True)
    threading.Timer(0.2, stream.finish, [DataError("the shard is damaged")]).start()
    trainer = Trainer(spec, stream, prepared.tokens.folder, tmp_path, ALONE)
    with pytest.raises(DataError, match="the shard is damaged"):
        trainer.run()
