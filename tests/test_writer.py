"""checkpoint/writer.py: what is written is what llama.cpp and albor read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from albor_serve.checkpoint import open_checkpoint, open_gguf_header
from albor_serve.checkpoint.writer import write_gguf
from albor_serve.errors import CheckpointError, CheckpointFormatError, UnsupportedModelError
from tests.fixtures_checkpoint import save_tiny_model, write_safetensors
from tests.fixtures_llamacpp import llama_model, logits

torch = pytest.importorskip("torch")

_TOKENS = [5, 300, 17, 9, 250, 33, 41, 300, 8, 77, 123, 399, 64, 2, 90, 11]

_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama no gqa": ("llama", {"num_key_value_heads": 4}),
    "llama head_dim 32": ("llama", {"head_dim": 32}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    ),
    "llama llama3": (
        "llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2 yarn factor": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "attention_factor": 1.3,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
}


def _expected_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(torch.tensor([_TOKENS])).logits[0].numpy()
    return result


@pytest.mark.parametrize("variant", sorted(_VARIANTS))
def test_llamacpp_computes_the_logits_of_transformers(variant: str, tmp_path: Path) -> None:
    architecture, changes = _VARIANTS[variant]
    model = save_tiny_model(tmp_path, architecture, **changes)
    expected = _expected_logits(model)
    source = open_checkpoint(tmp_path)
    out = tmp_path / "out.gguf"
    write_gguf(source, tmp_path / "tokenizer.json", out, "f32")
    with llama_model(out) as (loaded, _):
        found = logits(loaded, _TOKENS)
    spread = float(expected.std())
    assert spread > 0.5  # a model whose logits are all alike would prove nothing
    np.testing.assert_allclose(found, expected, atol=2e-3 * spread, rtol=1e-3)


@pytest.mark.parametrize("variant", sorted(_VARIANTS))
def test_config_and_weights_survive_the_round_trip(variant: str, tmp_path: Path) -> None:
    architecture, changes = _VARIANTS[variant]
    save_tiny_model(tmp_path, architecture, **changes)
    source = open_checkpoint(tmp_path)
    out = tmp_path / "out.gguf"
    write_gguf(source, tmp_path / "tokenizer.json", out, "f32")
    copy = open_checkpoint(out)
    assert copy.config == source.config
    assert list(copy.tensor_names) == list(source.tensor_names)
    for name in source.tensor_names:
        assert np.array_equal(copy.read(name), source.read(name)), name
        assert np.array_equal(copy.read(name, 3, 7), source.read(name, 3, 7)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_f16_logits_are_close(dtype: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "llama", dtype)
    out = tmp_path / "out.gguf"
    write_gguf(open_checkpoint(tmp_path), tmp_path / "tokenizer.json", out, "f16")
    expected = _expected_logits(model)
    with llama_model(out) as (loaded, _):
        found = logits(loaded, _TOKENS)
    assert np.abs(found - expected).max() < 0.05 * expected.std()


@pytest.mark.parametrize(("quant", "tolerance"), [("q8_0", 0.1), ("q4_0", 0.8)])
def test_quantized_files_load_and_stay_near(quant: Any, tolerance: float, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "qwen3")
    out = tmp_path / "out.gguf"
    seen: list[tuple[int, int, str]] = []
    reports = write_gguf(
        open_checkpoint(tmp_path),
        tmp_path / "tokenizer.json",
        out,
        quant,
        lambda *step: seen.append(step),
    )
    formats = {report.name.rsplit(".", 2)[-2]: report.format for report in reports}
    assert formats["embed_tokens"] == formats["q_proj"] == quant.upper()
    assert formats["q_norm"] == formats["norm"] == "F32"
    assert all(0 <= report.relative_error < 0.12 for report in reports)
    assert seen[-1][0] == seen[-1][1] == sum(report.num_weights for report in reports)
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)
    expected = _expected_logits(model)
    with llama_model(out) as (loaded, _):
        found = logits(loaded, _TOKENS)
    assert np.sqrt(((found - expected) ** 2).mean()) < tolerance * expected.std()


def test_rows_that_are_not_whole_groups_fall_back_to_f16(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", intermediate_size=80)
    out = tmp_path / "out.gguf"
    reports = write_gguf(open_checkpoint(tmp_path), tmp_path / "tokenizer.json", out, "q4_0")
    formats = {report.name: report.format for report in reports}
    assert formats["model.layers.0.mlp.down_proj.weight"] == "F16"
    assert formats["model.layers.0.mlp.up_proj.weight"] == "Q4_0"
    with llama_model(out) as (loaded, _):
        assert np.isfinite(logits(loaded, _TOKENS)).all()


def test_quantized_rows_come_back_in_hugging_face_order(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    source = open_checkpoint(tmp_path)
    out = tmp_path / "out.gguf"
    write_gguf(source, tmp_path / "tokenizer.json", out, "q8_0")
    copy = open_checkpoint(out)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.abs(copy.read(name) - source.read(name)).max() < 0.01
    stored = copy.quantized(name)
    assert (stored.format, stored.shape, stored.data.shape) == ("Q8_0", (64, 64), (64, 68))
    with pytest.raises(KeyError):
        copy.quantized("model.layers.9.self_attn.q_proj.weight")


def test_metadata_names_special_tokens(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen3")
    out = tmp_path / "out.gguf"
    write_gguf(
        open_checkpoint(tmp_path),
        tmp_path / "tokenizer.json",
        out,
        "q4_0",
        general={"license": "apache-2.0"},
    )
    meta = open_gguf_header(out).metadata
    ids = {role: meta[f"tokenizer.ggml.fim_{role}_token_id"] for role in ("pre", "suf", "mid")}
    assert ids == {"pre": 1, "suf": 3, "mid": 2}
    assert meta["general.license"] == "apache-2.0"
    assert meta["general.file_type"] == 2
    assert meta["tokenizer.ggml.add_bos_token"] is False
    with llama_model(out, vocab_only=True) as (_, vocab):
        assert llama_cpp.llama_vocab_fim_pre(vocab) == 1
        assert llama_cpp.llama_vocab_fim_pad(vocab) == 4
        assert llama_cpp.llama_vocab_fim_rep(vocab) == 5
        assert llama_cpp.llama_vocab_fim_sep(vocab) == 6
        assert llama_cpp.llama_vocab_eos(vocab) == 0
        assert llama_cpp.llama_vocab_is_control(vocab, 1)
        assert not llama_cpp.llama_vocab_get_add_bos(vocab)


def test_several_end_tokens_survive(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen2", eos_token_id=[0, 6, 4])
    out = tmp_path / "out.gguf"
    source = open_checkpoint(tmp_path)
    assert source.config.eos_token_ids == (0, 6, 4)
    write_gguf(source, tmp_path / "tokenizer.json", out, "q8_0")
    assert open_checkpoint(out).config.eos_token_ids == (0, 6, 4)
    with llama_model(out, vocab_only=True) as (_, vocab):
        assert all(llama_cpp.llama_vocab_is_eog(vocab, token) for token in (0, 6, 4))


def test_gguf_to_gguf_keeps_the_tokenizer(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write_gguf(open_checkpoint(tmp_path), tmp_path / "tokenizer.json", first, "f16")
    write_gguf(open_checkpoint(first), None, second, "q8_0")
    a, b = open_gguf_header(first).metadata, open_gguf_header(second).metadata
    keys = [key for key in a if key.startswith("tokenizer.")]
    assert len(keys) > 8
    assert all(a[key] == b[key] and a.type_name(key) == b.type_name(key) for key in keys)
    assert open_checkpoint(first).config == open_checkpoint(second).config


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    source = open_checkpoint(tmp_path)
    folder = tmp_path / "new"
    folder.mkdir()

    def interrupt(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(source, tmp_path / "tokenizer.json", folder / "out.gguf", "q4_0", interrupt)
    assert list(folder.iterdir()) == []
    (folder / "out.gguf").write_bytes(b"precious")
    tensors = {name: source.read(name) for name in source.tensor_names}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointFormatError, match="up_proj"):
        write_gguf(open_checkpoint(tmp_path), tmp_path / "tokenizer.json", folder / "out.gguf")
    assert [path.name for path in folder.iterdir()] == ["out.gguf"]
    assert (folder / "out.gguf").read_bytes() == b"precious"


def test_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    with pytest.raises(CheckpointError):
        write_gguf(
            open_checkpoint(tmp_path), tmp_path / "tokenizer.json", tmp_path / "no" / "out.gguf"
        )


def test_head_widths_that_llamacpp_cannot_load_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen2", head_dim=32)
    with pytest.raises(UnsupportedModelError, match="head"):
        write_gguf(open_checkpoint(tmp_path), tmp_path / "tokenizer.json", tmp_path / "out.gguf")


def test_yarn_bounds_that_llamacpp_ignores_are_refused(tmp_path: Path) -> None:
    scaling = _VARIANTS["qwen2 yarn"][1]["rope_parameters"] | {"beta_slow": 2.0}
    save_tiny_model(tmp_path, "qwen2", rope_parameters=scaling)
    assert open_checkpoint(tmp_path).config.rope.beta_slow == 2.0
    with pytest.raises(UnsupportedModelError, match="beta_slow"):
        write_gguf(open_checkpoint(tmp_path), tmp_path / "tokenizer.json", tmp_path / "out.gguf")


def test_llama3_scaling_is_refused_where_llamacpp_ignores_it(tmp_path: Path) -> None:
    scaling = _VARIANTS["llama llama3"][1]["rope_parameters"]
    save_tiny_model(tmp_path, "qwen2", rope_parameters=scaling)
    with pytest.raises(UnsupportedModelError, match="llama3"):
        write_gguf(
            open_checkpoint(tmp_path), tmp_path / "tokenizer.json", tmp_path / "out.gguf", "f32"
        )
