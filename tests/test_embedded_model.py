"""The model that ships with the project."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np

from albor_serve.checkpoint import open_checkpoint
from tests.fixtures_llamacpp import llama_model, logits, tokenize

_PATH = Path(__file__).parents[1] / "models" / "albor-33m-q4_0.gguf"


def test_is_the_model_on_its_card() -> None:
    checkpoint = open_checkpoint(_PATH)
    config = checkpoint.config
    assert (config.architecture, config.num_layers, config.hidden_size) == ("qwen3", 8, 512)
    assert (config.vocab_size, config.max_seq_len, config.eos_token_ids) == (16384, 2048, (0,))
    assert config.num_parameters == 33_564_160
    assert config.tie_embeddings
    for name in checkpoint.tensor_names:
        expected = "F32" if len(checkpoint.shape(name)) == 1 else "Q4_0"
        assert checkpoint.quantized(name).format == expected
    assert _PATH.stat().st_size < 20_000_000


def test_llamacpp_yields_the_ids_of_the_original_tokenizer() -> None:
    text = "def f(x=None):\n\tif x is None:\r\n        return 'naïve 🙂 中文' + str(12345)"
    expected = [
        487,
        307,
        805,
        876,
        344,
        213,
        1062,
        569,
        357,
        378,
        41,
        5968,
        275,
        380,
        396,
        4118,
        143,
        123,
        425,
        236,
        188,
        269,
        263,
        240,
        236,
        176,
        132,
        271,
        178,
        260,
        245,
        22,
        515,
        518,
        23,
        32,
        33,
        34,
        35,
        36,
        24,
    ]  # from the tokenizer.json that the model was trained with
    with llama_model(_PATH, vocab_only=True) as (_, vocab):
        assert tokenize(vocab, text) == expected


def test_fills_in_code_in_llamacpp() -> None:
    with llama_model(_PATH) as (model, vocab):
        assert [
            llama_cpp.llama_vocab_fim_pre(vocab),
            llama_cpp.llama_vocab_fim_mid(vocab),
            llama_cpp.llama_vocab_fim_suf(vocab),
        ] == [1, 2, 3]
        text = (
            "<|fim_prefix|><|fim_suffix|>\n    return total\n<|fim_middle|>"
            "def add_all(values):\n    total = 0\n    for value in values:\n        total +="
        )
        tokens = tokenize(vocab, text, parse_special=True)
        assert tokens[:2] == [1, 3]
        best = int(np.argmax(logits(model, tokens)[-1]))
        assert best == tokenize(vocab, " value")[0]
