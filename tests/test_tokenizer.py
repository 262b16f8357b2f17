"""JsonTokenizer: exact bytes, exact control tokens, no injection."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel

from albor_serve.errors import (
    CheckpointError,
    CheckpointFormatError,
    RequestError,
    UnsupportedModelError,
)
from albor_serve.tokenizer import JsonTokenizer, Tokenizer, well_formed
from tests.fixtures_tiny import SPECIALS, save_hf_folder, tiny_model, tiny_tokenizer_json


@functools.cache
def shared_tokenizer() -> JsonTokenizer:
    return JsonTokenizer(tiny_tokenizer_json())


@pytest.fixture
def tokenizer() -> JsonTokenizer:
    return shared_tokenizer()


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(tiny_tokenizer_json()) | fields)


def test_is_a_tokenizer(tokenizer: JsonTokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.vocab_size == 512
    assert not tokenizer.adds_bos
    assert tokenizer.bos_token_id is None


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back_byte_for_byte(text: str) -> None:
    tokenizer = shared_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == well_formed(text).encode()
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIALS, "a", " ", "<|", "|>", "\n"]), max_size=8))
def test_control_tokens_cannot_be_injected(parts: list[str]) -> None:
    tokenizer = shared_tokenizer()
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(SPECIALS.values())
    assert tokenizer.decode(ids) == text.encode()


def test_control_tokens_are_found_where_asked(tokenizer: JsonTokenizer) -> None:
    ids = tokenizer.encode("<|fim_prefix|>a <|fim_middle|>", parse_special=True)
    assert ids == [1, *tokenizer.encode("a "), 2]
    assert tokenizer.decode(ids) == b"a "
    assert tokenizer.token_bytes(1) == b""


def test_special_ids(tokenizer: JsonTokenizer) -> None:
    for spelling, token_id in SPECIALS.items():
        assert tokenizer.special_id(spelling) == token_id
    for other in ("", "def", "<|fim_prefix|> ", "<|fim_prefix|><|fim_prefix|>", "<|nothing|>"):
        assert tokenizer.special_id(other) is None


def test_every_token_that_ends_an_answer(tokenizer: JsonTokenizer) -> None:
    names = ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|im_end|>")
    assert tokenizer.eos_token_ids == {SPECIALS[n] for n in names}
    more = JsonTokenizer(tiny_tokenizer_json(), eos_token_ids=[300])
    assert more.eos_token_ids == tokenizer.eos_token_ids | {300}


def test_fim_tokens_not_marked_special_are_control_tokens_all_the_same() -> None:
    data = json.loads(tiny_tokenizer_json())
    for token in data["added_tokens"]:
        token["special"] = False
    tokenizer = JsonTokenizer(json.dumps(data))
    assert not set(tokenizer.encode("<|fim_prefix|>x<|file_sep|>")) & set(range(16))
    assert tokenizer.special_id("<|fim_prefix|>") == 1
    assert tokenizer.token_bytes(1) == b""
    assert 6 in tokenizer.eos_token_ids


def test_ordinary_added_tokens_stay_text() -> None:
    data = json.loads(tiny_tokenizer_json())
    data["added_tokens"].append(
        {
            "id": 512,
            "content": "é\t\t",
            "special": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    tokenizer = JsonTokenizer(json.dumps(data))
    assert tokenizer.encode("é\t\t") == [512]
    assert tokenizer.token_bytes(512) == "é\t\t".encode()
    assert tokenizer.special_id("é\t\t") is None


def test_long_runs_and_odd_text(tokenizer: JsonTokenizer) -> None:
    run = next(i for i in range(512) if tokenizer.token_bytes(i) == b" " * 128)
    assert run in tokenizer.encode(" " * 129)
    for text in ("\x00a\x00", "a\r\nb\r\n", "👨‍👩‍👧", "e\u0301\u0301", "\ufeff", "\t" * 50):
        assert tokenizer.decode(tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("\ud800\ud800", "\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("plain", "plain"),
    ],
)
def test_lone_surrogates(tokenizer: JsonTokenizer, text: str, expected: str) -> None:
    assert well_formed(text) == expected
    assert tokenizer.encode(text) == tokenizer.encode(expected)


def test_ids_outside_the_vocabulary(tokenizer: JsonTokenizer) -> None:
    for token_id in (-1, 512):
        with pytest.raises(RequestError, match="use 0 to 511"):
            tokenizer.token_bytes(token_id)
        with pytest.raises(RequestError, match=f"token id {token_id} is outside"):
            tokenizer.decode([20, token_id])


def test_padded_embedding() -> None:
    tokenizer = JsonTokenizer(tiny_tokenizer_json(), vocab_size=640)
    assert tokenizer.vocab_size == 640
    assert tokenizer.token_bytes(639) == b""
    with pytest.raises(CheckpointError, match="512 tokens, but the model only 500"):
        JsonTokenizer(tiny_tokenizer_json(), vocab_size=500)


def test_beginning_of_text_from_the_post_processor() -> None:
    rust = RustTokenizer.from_str(tiny_tokenizer_json())
    rust.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = JsonTokenizer(rust.to_str())
    assert tokenizer.adds_bos
    assert tokenizer.bos_token_id == 0
    assert tokenizer.encode("x") == JsonTokenizer(tiny_tokenizer_json()).encode("x")
    assert not JsonTokenizer(rust.to_str(), adds_bos=False).adds_bos


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    rust = RustTokenizer.from_str(tiny_tokenizer_json())
    rust.enable_truncation(4)
    rust.enable_padding(length=32, pad_id=4)
    tokenizer = JsonTokenizer(rust.to_str())
    assert tokenizer.decode(tokenizer.encode("one two three four five")) == (
        b"one two three four five"
    )
    assert len(tokenizer.encode("x")) == 1


def sentencepiece_json() -> str:
    """A small BPE of the SentencePiece kind with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], "\u2581", "a", "b"]
    pieces += ["\u2581a", "ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    rust = RustTokenizer(
        BPE(vocab, [("\u2581", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    rust.normalizer = normalizers.Replace(" ", "\u2581")
    rust.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    return str(rust.to_str())


def test_sentencepiece_vocabulary_with_byte_fallback() -> None:
    tokenizer = JsonTokenizer(sentencepiece_json())
    for text in ("ab a b", "né\n\t😀", "  a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert tokenizer.token_bytes(3 + 0xC3) == b"\xc3"
    assert tokenizer.eos_token_ids == {2}
    assert 1 not in tokenizer.encode("<s>")


def test_vocabulary_without_bytes_is_refused() -> None:
    rust = RustTokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedModelError, match="neither byte-level"):
        JsonTokenizer(rust.to_str())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": 3}',
        changed(added_tokens=[{"id": -1, "content": "x"}]),
        changed(added_tokens=[{"id": "0", "content": "x"}]),
        changed(added_tokens=7),
        changed(model={"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}),
        changed(pre_tokenizer={"type": "NoSuch"}),
        "[" * 100_000,
    ],
)
def test_damaged_files(text: str) -> None:
    with pytest.raises(CheckpointFormatError) as info:
        JsonTokenizer(text)
    assert "\n" not in str(info.value)


def test_from_folder(tmp_path: Path) -> None:
    folder = save_hf_folder(tmp_path / "m", *tiny_model("llama"))
    settings_path = folder / "tokenizer_config.json"
    tokenizer = JsonTokenizer.from_folder(folder, vocab_size=520)
    assert (tokenizer.bos_token_id, tokenizer.adds_bos, tokenizer.vocab_size) == (0, False, 520)
    settings = {"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}
    settings |= {"eos_token": "<|reserved_9|>"}
    settings_path.write_text(json.dumps(settings))
    tokenizer = JsonTokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (7, True)
    assert 9 in tokenizer.eos_token_ids
    settings_path.unlink()
    assert JsonTokenizer.from_folder(folder, bos_token_id=3).bos_token_id == 3
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        JsonTokenizer.from_folder(folder)


def test_threads_get_their_own_answers(tokenizer: JsonTokenizer) -> None:
    text = "<|fim_prefix|>def f(x):\n    return x\n" * 50
    plain, parsed = tokenizer.encode(text), tokenizer.encode(text, parse_special=True)
    assert plain != parsed
    answers: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        special = number % 2 == 0
        answers[number] = [tokenizer.encode(text, parse_special=special) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, ids in answers.items():
        assert ids == [parsed if number % 2 == 0 else plain] * 20
    assert len(answers) == 6


def test_a_file_that_makes_the_library_panic_is_refused() -> None:
    data = json.loads(tiny_tokenizer_json())
    data["model"]["continuing_subword_prefix"] = "a" * 5000
    with pytest.raises(CheckpointFormatError) as caught:
        JsonTokenizer(json.dumps(data))
    assert len(str(caught.value)) < 600
