"""bench/perplexity.py: against transformers on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from albor_serve.bench.perplexity import perplexity
from albor_serve.checkpoint import open_checkpoint
from albor_serve.checkpoint.writer import write_gguf
from albor_serve.errors import CheckpointFormatError, ConfigError
from tests.fixtures_checkpoint import save_tiny_model

torch = pytest.importorskip("torch")

_TEXTS = ["def main(argv):\n    return argv[1:] + 12345\n" * 3, "x", "class Node:\n    pass\n"]


def test_equals_the_loss_of_transformers(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "qwen2")
    out = tmp_path / "out.gguf"
    write_gguf(open_checkpoint(tmp_path), tmp_path / "tokenizer.json", out, "f32")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    loss, count = 0.0, 0
    for text in _TEXTS:
        ids = tokenizer.encode(text).ids
        for start in range(0, len(ids), 16):
            window = ids[start : start + 16]
            if len(window) > 1:
                tokens = torch.tensor([window])
                with torch.no_grad():
                    loss += float(model(tokens, labels=tokens).loss) * (len(window) - 1)
                count += len(window) - 1
    steps: list[tuple[int, int]] = []
    result = perplexity(out, _TEXTS, 16, lambda *step: steps.append(step), num_threads=1)
    assert result.num_tokens == count
    assert result.perplexity == pytest.approx(math.exp(loss / count), rel=1e-3)
    assert result.num_bytes == sum(len(text) for text in _TEXTS)
    assert result.bits_per_byte == pytest.approx(loss / math.log(2) / result.num_bytes, rel=1e-3)
    assert steps[-1][0] == steps[-1][1]
    short = perplexity(out, _TEXTS, 16, max_tokens=4, num_threads=1)
    assert short.num_bytes == len(_TEXTS[0])


def test_refuses_what_cannot_be_scored(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    out = tmp_path / "out.gguf"
    write_gguf(open_checkpoint(tmp_path), tmp_path / "tokenizer.json", out, "q4_0")
    for texts, ctx in ((["x"], 16), ([], 16), (_TEXTS, 1)):
        with pytest.raises(ConfigError):
            perplexity(out, texts, ctx)
    (tmp_path / "bad.gguf").write_bytes(out.read_bytes()[:4000])
    with pytest.raises(CheckpointFormatError):
        perplexity(tmp_path / "bad.gguf", _TEXTS, 16)
