from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albor_train.errors import DataError
from albor_train.export import export_gguf
from albor_train.runs import save_model_folder
from albor_train.spec import load_spec
from albor_train.tokenizer import (
    SPECIALS,
    TrainingTokenizer,
    bytes_per_token,
    open_encoder,
    train_tokenizer,
)
from albor_train.train import initial_weights
from tests.train.fixtures_train import source_file, write_tiny_spec


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TrainingTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((source_file(seed) for seed in range(60)), 512, folder)
    return TrainingTokenizer(folder)


def test_vocabulary_is_exact_and_starts_with_the_control_tokens(
    tokenizer: TrainingTokenizer,
) -> None:
    assert tokenizer.vocab_size == 512
    assert [tokenizer.special(s) for s in SPECIALS[:7]] == list(range(7))


def test_round_trip_of_ten_thousand_random_strings(tokenizer: TrainingTokenizer) -> None:
    rng = random.Random(0)
    for _ in range(10_000):
        data = rng.randbytes(rng.randint(0, 24))
        text = data.decode("utf-8", "ignore")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("") == []


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(" \t\nabc(){}:_=1é漢🙂"), max_size=60))
def test_round_trip_of_code_like_text(tokenizer: TrainingTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("length", range(1, 65))
def test_every_indentation_is_one_token(tokenizer: TrainingTokenizer, length: int) -> None:
    assert len(tokenizer.encode(" " * length)) == 1
    # The last space goes with the word, as Qwen2's pattern has it.
    inside = tokenizer.encode("\n" + " " * length + "x")
    assert len(inside) <= 4


@pytest.mark.parametrize("length", range(1, 17))
def test_tabs_too(tokenizer: TrainingTokenizer, length: int) -> None:
    assert len(tokenizer.encode("\t" * length)) == 1


def test_text_cannot_inject_control_tokens(tokenizer: TrainingTokenizer) -> None:
    ids = tokenizer.encode("a <|fim_middle|> b <|endoftext|>")
    assert min(ids) >= len(SPECIALS)
    assert tokenizer.decode(ids) == "a <|fim_middle|> b <|endoftext|>"


def test_same_text_same_tokenizer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train_tokenizer((source_file(seed) for seed in range(30)), 520, tmp_path / name)
    first, second = ((tmp_path / n / "tokenizer.json").read_bytes() for n in ("a", "b"))
    assert first == second


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="merges"):
        train_tokenizer(["x = 1\n"], 4096, tmp_path)


def test_transformers_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    train_tokenizer((source_file(seed) for seed in range(30)), 520, tmp_path)
    ours = TrainingTokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = source_file(99) + "\n\t\tπ = 'é🙂'\r\n        return  x\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == 0


def test_any_tokenizer_can_be_compared(tmp_path: Path) -> None:
    """A vocabulary inside a GGUF file cuts a text as the tokenizer.json it was made of."""
    train_tokenizer((source_file(seed) for seed in range(40)), 512, tmp_path)
    spec = load_spec(write_tiny_spec(tmp_path / "spec"))
    weights = initial_weights(spec.model_config, spec.train, 1)
    folder = tmp_path / "model"
    save_model_folder(folder, weights, spec.model_config, tmp_path, dtype=torch.float32)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    texts = [source_file(seed) for seed in range(3)]
    by_folder = open_encoder(folder)
    by_gguf = open_encoder(tmp_path / "model.gguf")
    assert [by_gguf(text) for text in texts] == [by_folder(text) for text in texts]
    assert 1.5 < bytes_per_token(by_gguf, texts) < 8
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for path in ("broken.gguf", "absent.json"):
        with pytest.raises(DataError, match=path):
            open_encoder(tmp_path / path)
