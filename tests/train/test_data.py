from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from albor_train.data import build_corpus, read_documents
from albor_train.errors import DataError
from albor_train.spec import load_spec
from tests.train.fixtures_train import source_file, tiny_spec_dict, write_tiny_spec


def evaluation_folder(folder: Path) -> None:
    folder.mkdir()
    problem = {
        "prompt": "def has_close_elements(numbers):\n    pass\n",
        "canonical_solution": "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda "
        "micron nuance omicron",
    }
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    raw = tiny_spec_dict()
    raw["data"]["evaluation"] = "eval"  # type: ignore[index]
    evaluation_folder(tmp_path / "eval")
    path = write_tiny_spec(tmp_path, raw)
    alpha, beta = tmp_path / "alpha", tmp_path / "beta"
    shutil.copy(alpha / "pkg0/module_0.py", alpha / "copy.py")
    text = (alpha / "pkg1/module_1.py").read_text()
    (alpha / "near.py").write_text(text.replace("The module", "One module"))
    # The held-out project must win against a copy in the training part.
    shutil.copy(beta / "pkg0/module_0.py", alpha / "of_beta.py")
    own = source_file(77)
    (alpha / "named.py").write_text(own + "\n\ndef has_close_elements(x):\n    return x\n")
    run = "Alpha, beta: gamma delta epsilon zeta eta theta iota kappa lambda micron nuance"
    (alpha / "quoted.py").write_text(source_file(78) + f"\n# {run}\n")
    (alpha / "broken.py").write_text(own + "\ndef oops(:\n")
    (alpha / "generated.py").write_text("# This file is auto-generated\n" + source_file(79))
    (alpha / "private.py").write_text(
        source_file(80) + "\nAUTHOR = 'jane.doe@corp.com'\nKEY = 'AKIAABCDEFGHIJKLMNOP'\n"
    )
    return path


def test_corpus_drops_what_it_should(spec_path: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_path)
    artefact = build_corpus(spec, tmp_path / "work")
    train = {d.path: d for d in read_documents(artefact.folder / "train.jsonl.gz")}
    validation = list(read_documents(artefact.folder / "validation.jsonl.gz"))
    assert {d.project for d in train.values()} == {"alpha"}
    assert {d.project for d in validation} == {"beta"}
    assert len(validation) == 12
    gone = {"named.py", "quoted.py", "broken.py", "generated.py", "of_beta.py"}
    assert not gone & set(train)
    # Of a file and its copy, the first by path stays.
    assert "copy.py" in train
    assert "pkg0/module_0.py" not in train
    assert ("near.py" in train) != ("pkg1/module_1.py" in train)
    private = train["private.py"].text
    assert "jane.doe" not in private
    assert "AKIA" not in private
    report = artefact.report
    assert report["dropped"]["contaminated, name: HumanEval"] == 1
    assert report["dropped"]["contaminated, ngram: HumanEval"] == 1
    assert report["dropped"]["does not parse"] == 1
    card = (artefact.folder / "DATA_CARD.md").read_text()
    assert "| alpha | local | MIT | train |" in card


def test_same_corpus_whatever_the_processes(spec_path: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_path)
    one = build_corpus(spec, tmp_path / "one")
    two = build_corpus(spec, tmp_path / "two", processes=2)
    for name in ("train.jsonl.gz", "validation.jsonl.gz", "artefact.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_second_run_makes_nothing_and_a_change_makes_anew(spec_path: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_path)
    work = tmp_path / "work"
    first = build_corpus(spec, work)
    again = build_corpus(spec, work)
    assert first.was_made
    assert not again.was_made
    (tmp_path / "alpha/new.py").write_text(source_file(500))
    changed = build_corpus(spec, work)
    assert changed.was_made
    assert changed.folder != first.folder


def test_interrupted_build_leaves_nothing(spec_path: Path, tmp_path: Path) -> None:
    def stop(_what: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        build_corpus(load_spec(spec_path), work, progress=stop)
    assert list(work.iterdir()) == []


def test_copyleft_folder_is_refused(tmp_path: Path) -> None:
    raw = tiny_spec_dict()
    raw["data"]["folders"][0]["licence"] = "GPL-3.0-only"  # type: ignore[index]
    spec = load_spec(write_tiny_spec(tmp_path, raw))
    with pytest.raises(DataError, match="GPL"):
        build_corpus(spec, tmp_path / "work")


def test_missing_held_out_project_is_an_error(tmp_path: Path) -> None:
    raw = tiny_spec_dict()
    raw["data"]["held_out"] = ["gamma"]  # type: ignore[index]
    with pytest.raises(DataError, match="gamma"):
        build_corpus(load_spec(write_tiny_spec(tmp_path, raw)), tmp_path / "work")


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    raw = tiny_spec_dict()
    raw["data"]["filters"] = {"min_bytes": 100_000}  # type: ignore[index]
    with pytest.raises(DataError, match="too small"):
        build_corpus(load_spec(write_tiny_spec(tmp_path, raw)), tmp_path / "work")
