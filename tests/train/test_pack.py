from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from albor_train.artefact import Artefact
from albor_train.data import build_corpus, read_documents
from albor_train.errors import DataError
from albor_train.pack import (
    build_pack,
    build_tokenizer,
    build_tokens,
    open_pack,
    read_token_shard,
)
from albor_train.spec import Spec, load_spec
from albor_train.tokenizer import TrainingTokenizer
from tests.train.fixtures_train import write_tiny_spec


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, Artefact, Artefact, Path]:
    folder = tmp_path_factory.mktemp("pack")
    spec = load_spec(write_tiny_spec(folder))
    work = folder / "work"
    corpus = build_corpus(spec, work)
    tokenizer = build_tokenizer(spec, corpus, work)
    tokens = build_tokens(corpus, tokenizer, work, max_shard_bytes=1 << 20)
    return spec, corpus, tokens, work


def test_shards_hold_the_corpus(made: tuple[Spec, Artefact, Artefact, Path]) -> None:
    _, corpus, tokens, _ = made
    tokenizer = TrainingTokenizer(tokens.folder)
    shard = {
        p: tokenizer.decode(ids.tolist())
        for _, p, ids in read_token_shard(tokens.folder / "train-00.tok.xz")
    }
    assert shard == {d.path: d.text for d in read_documents(corpus.folder / "train.jsonl.gz")}


def test_rows_hold_whole_examples(made: tuple[Spec, Artefact, Artefact, Path]) -> None:
    spec, _, tokens, work = made
    artefact = build_pack(spec, tokens, work)
    pack = open_pack(artefact)
    tokenizer = TrainingTokenizer(tokens.folder)
    fim_prefix = tokenizer.special("<|fim_prefix|>")
    num_examples = num_fim = 0
    for row in pack.rows:
        kept = row[row != pack.pad_id]
        assert (row[len(kept) :] == pack.pad_id).all()
        assert kept[-1] == pack.end_id
        ends = np.flatnonzero(kept == pack.end_id)
        num_examples += len(ends)
        for example in np.split(kept, ends + 1)[:-1]:
            controls = [int(i) for i in example if i in (1, 2, 3)]
            # A whole example has all three markers or none.
            assert sorted(controls) in ([], [1, 2, 3])
            num_fim += fim_prefix in example
    assert num_examples == artefact.report["num_examples"]
    assert 0.4 < num_fim / num_examples < 0.8
    assert artefact.report["padding_share"] < 0.1


def test_packs_do_not_depend_on_processes(made: tuple[Spec, Artefact, Artefact, Path]) -> None:
    spec, _, tokens, work = made
    one = build_pack(spec, tokens, work / "one")
    two = build_pack(spec, tokens, work / "two", processes=2)
    assert (one.folder / "rows.u16").read_bytes() == (two.folder / "rows.u16").read_bytes()


def test_epochs_differ_but_hold_the_same_text(
    made: tuple[Spec, Artefact, Artefact, Path],
) -> None:
    spec, _, tokens, work = made
    tokenizer = TrainingTokenizer(tokens.folder)

    def characters(epoch: int) -> list[str]:
        rows = open_pack(build_pack(spec, tokens, work, epoch=epoch, fim_rate=0.0)).rows
        text = "".join(tokenizer.decode(row.tolist()) for row in rows)
        return sorted(line for line in text.splitlines() if "def " in line)

    rows = [open_pack(build_pack(spec, tokens, work, epoch=e)).rows for e in (0, 1)]
    assert rows[0].tobytes() != rows[1].tobytes()
    assert set(characters(0)) == set(characters(1))


def test_damaged_shards_are_errors(
    made: tuple[Spec, Artefact, Artefact, Path], tmp_path: Path
) -> None:
    _, _, tokens, _ = made
    data = (tokens.folder / "train-00.tok.xz").read_bytes()
    for name, bad in (("cut", data[:-40]), ("flip", data[:50] + b"\0\1\2" + data[53:])):
        path = tmp_path / name
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"damaged|ends early"):
            list(read_token_shard(path))


def test_unknown_shard_is_an_error(made: tuple[Spec, Artefact, Artefact, Path]) -> None:
    spec, _, tokens, work = made
    with pytest.raises(DataError, match=r"train-07\.tok\.xz"):
        build_pack(spec, tokens, work, shards=["train-07.tok.xz"])


def test_small_shards_are_split(made: tuple[Spec, Artefact, Artefact, Path]) -> None:
    _, corpus, tokens, work = made
    tokenizer = Artefact(tokens.folder, "another key", False)
    with pytest.raises(DataError, match="does not fit"):
        build_tokens(corpus, tokenizer, work, max_shard_bytes=500)
