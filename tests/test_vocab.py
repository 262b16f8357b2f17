"""checkpoint/vocab.py: llama.cpp yields the ids of tokenizer.json, or the file is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from albor_serve.checkpoint.vocab import GgufVocab, vocab_from_tokenizer_json
from albor_serve.config import ModelConfig
from albor_serve.errors import AlborError, CheckpointFormatError, UnsupportedModelError
from tests.fixtures_checkpoint import (
    HARD_STRINGS,
    SPECIALS,
    byte_level_tokenizer,
    spm_tokenizer_json,
)
from tests.fixtures_llamacpp import llama_model, tokenize

_KINDS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "seed-coder", "deepseek-coder")


def _config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "architecture": "llama",
        "vocab_size": 420,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_seq_len": 64,
        "eos_token_ids": (0,),
    }
    return ModelConfig(**(values | changes))


def _vocab_file(path: Path, vocab: GgufVocab) -> Path:
    """A GGUF file with a vocabulary and no tensors, enough for llama.cpp to tokenize."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    for key, value, kind in vocab.entries:
        element = kind.removeprefix("array[").removesuffix("]").upper()
        if kind.startswith("array"):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[element])
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType[element])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def _expected(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", _KINDS)
def test_llamacpp_yields_the_same_ids(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(kind)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocab = vocab_from_tokenizer_json(tmp_path / "tokenizer.json", _config())
    assert vocab.values["tokenizer.ggml.pre"] == kind
    path = _vocab_file(tmp_path / "vocab.gguf", vocab)
    with llama_model(path, vocab_only=True) as (_, native):
        for text in (*HARD_STRINGS, "a<tool_call>b"):
            # Control tokens parse on both sides here; nothing else differs.
            assert tokenize(native, text, parse_special=True) == _expected(tokenizer, text), text


@pytest.fixture(scope="module")
def qwen2_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("vocab")
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = vocab_from_tokenizer_json(folder / "tokenizer.json", _config())
    return tokenizer, _vocab_file(folder / "vocab.gguf", vocab)


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_yields_the_same_ids(qwen2_file: tuple[Tokenizer, Path], text: str) -> None:
    tokenizer, path = qwen2_file
    with llama_model(path, vocab_only=True) as (_, native):
        assert tokenize(native, text, parse_special=True) == _expected(tokenizer, text)


def test_sentencepiece_like_tokenizers_yield_the_same_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(spm_tokenizer_json()), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    vocab = vocab_from_tokenizer_json(
        tmp_path / "tokenizer.json", _config(bos_token_id=1, eos_token_ids=(2,))
    )
    assert vocab.values["tokenizer.ggml.model"] == "llama"
    path = _vocab_file(tmp_path / "vocab.gguf", vocab)
    with llama_model(path, vocab_only=True) as (_, native):
        for text in (
            "def turn(x):\n    return self.x",
            "selfreturn  ret\t你好🙂",
            "x",
            *HARD_STRINGS,
        ):
            if "<s>" not in text:
                assert tokenize(native, text) == _expected(tokenizer, text), text


def test_token_types_and_padding(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.add_tokens([AddedToken("<|custom|>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    values = vocab_from_tokenizer_json(tmp_path / "tokenizer.json", _config()).values
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == 420
    assert types[: len(SPECIALS)] == [3] * len(SPECIALS)
    assert types[tokens.index("Ġ")] == 1
    assert types[tokens.index("<tool_call>")] == 4
    assert types[tokens.index("<|custom|>")] == 3
    assert (tokens[419], types[419]) == ("[PAD419]", 5)


def test_absent_special_tokens_do_not_become_the_word_none(tmp_path: Path) -> None:
    raw = json.loads(byte_level_tokenizer().to_str())
    raw["model"]["vocab"]["None"] = 400
    raw["model"]["vocab"]["No"], raw["model"]["vocab"]["ne"] = 401, 402
    raw["model"]["merges"] += [["N", "o"], ["n", "e"], ["No", "ne"]]
    assert raw["model"]["unk_token"] is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    values = vocab_from_tokenizer_json(tmp_path / "tokenizer.json", _config()).values
    assert values["tokenizer.ggml.token_type"][400] == 1
    assert "tokenizer.ggml.unknown_token_id" not in values


@pytest.mark.parametrize("source", ["post_processor", "setting", "none", "setting off"])
def test_add_bos(source: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    if source in ("post_processor", "setting off"):
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
                ),
            ]
        )
    if source.startswith("setting"):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"add_bos_token": source == "setting"})
        )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocab = vocab_from_tokenizer_json(tmp_path / "tokenizer.json", _config(bos_token_id=0))
    assert vocab.values["tokenizer.ggml.add_bos_token"] is (source in ("post_processor", "setting"))


def test_end_token_comes_from_the_side_file_or_the_spelling(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = _config(eos_token_ids=())
    values = vocab_from_tokenizer_json(tmp_path / "tokenizer.json", config).values
    assert values["tokenizer.ggml.eos_token_id"] == 0
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|file_sep|>"}, "pad_token": "<|fim_pad|>"})
    )
    values = vocab_from_tokenizer_json(tmp_path / "tokenizer.json", config).values
    assert values["tokenizer.ggml.eos_token_id"] == 6
    assert values["tokenizer.ggml.padding_token_id"] == 4


def _refused(raw: dict[str, Any], folder: Path, **changes: Any) -> str:
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises((UnsupportedModelError, CheckpointFormatError)) as caught:
        vocab_from_tokenizer_json(folder / "tokenizer.json", _config(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refuses_what_llamacpp_has_no_counterpart_for(tmp_path: Path) -> None:
    raw = json.loads(byte_level_tokenizer().to_str())
    changed = json.loads(byte_level_tokenizer().to_str())
    changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\s+"
    assert "not known" in _refused(changed, tmp_path)
    assert "not known" in _refused(
        raw | {"model": raw["model"] | {"ignore_merges": True}}, tmp_path
    )
    assert "normalizes" in _refused(raw | {"normalizer": {"type": "Lowercase"}}, tmp_path)
    whitespace = {"type": "Whitespace"}
    assert "no counterpart" in _refused(raw | {"pre_tokenizer": whitespace}, tmp_path)
    assert "no counterpart" in _refused(raw | {"pre_tokenizer": None}, tmp_path)
    prefix = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__())
    assert "no counterpart" in _refused(raw | {"pre_tokenizer": prefix}, tmp_path)
    assert "Unigram" in _refused(raw | {"model": {"type": "Unigram", "vocab": []}}, tmp_path)
    assert "rows" in _refused(raw, tmp_path, vocab_size=100)
    nfc = json.loads(normalizers.NFC().__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": nfc}))
    assert vocab_from_tokenizer_json(tmp_path / "tokenizer.json", _config()).entries
    spm = spm_tokenizer_json()
    spm["model"]["merges"] = spm["model"]["merges"][3:]
    assert "merge list" in _refused(spm, tmp_path, bos_token_id=1, eos_token_ids=(2,))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_malformed_json_gives_a_clear_error(tmp_path: Path, data: st.DataObject) -> None:
    raw = json.loads(byte_level_tokenizer_text())
    junk = st.one_of(
        st.none(), st.integers(-5, 1 << 40), st.text(max_size=5), st.just([]), st.just({}),
        st.lists(st.integers(), max_size=3), st.just([["a"]]), st.just({"type": "Sequence"}),
    )  # fmt: skip
    place = data.draw(st.sampled_from(["model", "added_tokens", "pre_tokenizer", "post_processor"]))
    if place == "model" and data.draw(st.booleans()):
        raw["model"][data.draw(st.sampled_from(["vocab", "merges", "type", "unk_token"]))] = (
            data.draw(junk)
        )
    else:
        raw[place] = data.draw(junk)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with contextlib.suppress(AlborError):
        vocab_from_tokenizer_json(tmp_path / "tokenizer.json", _config())


_TEXT: list[str] = []


def byte_level_tokenizer_text() -> str:
    """tokenizer.json of the small tokenizer, trained once."""
    if not _TEXT:
        _TEXT.append(byte_level_tokenizer().to_str())
    return _TEXT[0]
