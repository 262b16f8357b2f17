"""Texts tokenized in parts have the tokens that they have as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor_serve import token_memo
from albor_serve.backends.llamacpp import LlamaCppVocabulary
from albor_serve.loader import LoadOptions, embedded_path, load_model
from albor_serve.token_memo import LineMemoTokenizer, can_be_cut_at_lines
from albor_serve.tokenizer import JsonTokenizer, Tokenizer
from tests.fixtures_tiny import tiny_tokenizer_json

CODE = "".join(path.read_text() for path in sorted(Path(token_memo.__file__).parent.glob("*.py")))
ODD = [
    "\n",
    "\r\n",
    "\r",
    " ",
    "\t",
    "    ",
    "\f",
    "\u2028",
    "\x85",
    "\xa0",
    "x",
    "(",
    "1",
    "é",
    "'s",
]


@pytest.fixture(scope="module")
def plain() -> Iterator[Tokenizer]:
    vocabulary = LlamaCppVocabulary(embedded_path())
    yield vocabulary.tokenizer
    vocabulary.close()


class Counting:
    """Another tokenizer, and what it was asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        self.texts.append(text)
        return self.tokenizer.encode(text, parse_special=parse_special)


lines = st.lists(
    st.one_of(st.sampled_from(CODE.split("\n")), st.lists(st.sampled_from(ODD)).map("".join)),
    max_size=60,
).map("\n".join)


@settings(max_examples=400, deadline=None)
@given(text=lines)
def test_same_tokens(plain: Tokenizer, text: str) -> None:
    assert LineMemoTokenizer(plain).encode(text) == plain.encode(text)


@settings(max_examples=100, deadline=None)
@given(text=lines)
def test_same_tokens_as_the_tokenizers_package(text: str) -> None:
    other = JsonTokenizer(tiny_tokenizer_json())
    assert LineMemoTokenizer(other).encode(text) == other.encode(text)


def test_real_code_at_every_length(plain: Tokenizer) -> None:
    memo = LineMemoTokenizer(plain)
    for end in range(1000, 12_000, 97):
        assert memo.encode(CODE[:end]) == plain.encode(CODE[:end])


def test_a_keystroke_costs_a_few_lines(plain: Tokenizer) -> None:
    counting = Counting(plain)
    memo = LineMemoTokenizer(counting)
    memo.encode(CODE[:20_000])
    counting.texts.clear()
    for more in range(1, 50):
        memo.encode(CODE[: 20_000 + more])
    assert max(map(len, counting.texts)) < 2000
    assert len(counting.texts) <= 50
    counting.texts.clear()
    memo.encode(CODE[:20_049])
    assert not counting.texts


def test_it_forgets_what_is_old(plain: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_memo, "MAX_MEMO_CHARS", 5000)
    counting = Counting(plain)
    memo = LineMemoTokenizer(counting)
    assert memo.encode(CODE[:40_000]) == plain.encode(CODE[:40_000])
    counting.texts.clear()
    memo.encode(CODE[:4000])
    assert counting.texts
    assert memo.encode(CODE[36_000:40_000]) == plain.encode(CODE[36_000:40_000])


def test_control_tokens_are_read_in_whole_texts(plain: Tokenizer) -> None:
    text = CODE[:3000] + "<|fim_prefix|>"
    memo = LineMemoTokenizer(plain)
    assert memo.encode(text, parse_special=True) == plain.encode(text, parse_special=True)
    assert memo.encode(text) == plain.encode(text)
    same = ("vocab_size", "bos_token_id", "adds_bos", "eos_token_ids")
    assert all(getattr(memo, name) == getattr(plain, name) for name in same)
    assert memo.decode(memo.encode(text)).decode() == text
    assert memo.token_bytes(50) == plain.token_bytes(50)
    assert memo.special_id("<|fim_prefix|>") == plain.special_id("<|fim_prefix|>")


def test_it_is_used_where_the_pattern_is_known() -> None:
    assert can_be_cut_at_lines("qwen2")
    assert not can_be_cut_at_lines("gpt-2")
    assert not can_be_cut_at_lines("")
    loaded = load_model(None, LoadOptions(num_slots=1, num_threads=1, max_seq_len=64))
    assert isinstance(loaded.engine.tokenizer, LineMemoTokenizer)
    loaded.engine.close()
