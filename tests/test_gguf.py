"""checkpoint/gguf.py: configs and tensors of files from other tools; what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albor_serve.checkpoint import GgufCheckpoint, open_checkpoint
from albor_serve.checkpoint.gguf import llama3_factors
from albor_serve.config import RopeConfig
from albor_serve.errors import AlborError, CheckpointFormatError, UnsupportedModelError

_KINDS = gguf.GGMLQuantizationType
_D, _D_FF, _VOCAB, _HEADS, _KV_HEADS, _HEAD_DIM = 256, 256, 64, 4, 2, 64


def _tensors(qkv_bias: bool = False, tied: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (_VOCAB, _D),
        "blk.0.attn_norm.weight": (_D,),
        "blk.0.attn_q.weight": (_HEADS * _HEAD_DIM, _D),
        "blk.0.attn_k.weight": (_KV_HEADS * _HEAD_DIM, _D),
        "blk.0.attn_v.weight": (_KV_HEADS * _HEAD_DIM, _D),
        "blk.0.attn_output.weight": (_D, _HEADS * _HEAD_DIM),
        "blk.0.ffn_norm.weight": (_D,),
        "blk.0.ffn_gate.weight": (_D_FF, _D),
        "blk.0.ffn_up.weight": (_D_FF, _D),
        "blk.0.ffn_down.weight": (_D, _D_FF),
        "output_norm.weight": (_D,),
    }
    if qkv_bias:
        for letter, heads in (("q", _HEADS), ("k", _KV_HEADS), ("v", _KV_HEADS)):
            shapes[f"blk.0.attn_{letter}.bias"] = (heads * _HEAD_DIM,)
    if not tied:
        shapes["output.weight"] = (_VOCAB, _D)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _write(
    path: Path,
    arch: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    **changes: Any,
) -> Path:
    """A file as another tool would write it; `changes` replace or drop (None) metadata."""
    writer = gguf.GGUFWriter(path, arch)
    values: dict[str, Any] = {
        "context_length": 128,
        "embedding_length": _D,
        "block_count": 1,
        "feed_forward_length": _D_FF,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e4,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in values.items():
        name = key if key.startswith(("split.", "tokenizer.")) else f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
    for name, tensor in (tensors or _tensors()).items():
        kind = (kinds or {}).get(name, _KINDS.F32)
        if kind in (_KINDS.F32, _KINDS.F16):
            writer.add_tensor(name, tensor.astype(np.float32 if kind == _KINDS.F32 else np.float16))
        else:
            writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_a_minimal_file_of_another_tool(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "model-Q4.gguf",
        "qwen2",
        _tensors(qkv_bias=True, tied=False),
        tokenizer__ggml__bos_token_id=5,
        tokenizer__ggml__eos_token_id=7,
        tokenizer__ggml__eot_token_id=9,
    )
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert (checkpoint.format, checkpoint.name) == ("gguf", "model-Q4")
    assert (config.architecture, config.head_dim, config.vocab_size) == ("qwen2", 64, 64)
    assert (config.qkv_bias, config.qk_norm, config.tie_embeddings) == (True, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (5, (7, 9))
    assert config.rms_norm_eps == 1e-5
    assert config.rope == RopeConfig()


def test_undoes_the_row_order_of_llama(tmp_path: Path) -> None:
    tensors = _tensors()
    checkpoint = open_checkpoint(_write(tmp_path / "m.gguf", "llama", tensors))
    stored = tensors["blk.0.attn_k.weight"].reshape(_KV_HEADS, _HEAD_DIM // 2, 2, _D)
    expected = stored.transpose(0, 2, 1, 3).reshape(-1, _D)
    assert np.array_equal(checkpoint.read("model.layers.0.self_attn.k_proj.weight"), expected)
    plain = checkpoint.read("model.layers.0.self_attn.v_proj.weight")
    assert np.array_equal(plain, tensors["blk.0.attn_v.weight"])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_decodes_quantized_tensors(kind: str, tmp_path: Path) -> None:
    tensors = _tensors()
    name = "blk.0.ffn_down.weight"
    path = _write(tmp_path / "m.gguf", tensors=tensors, kinds={name: _KINDS[kind]})
    checkpoint = open_checkpoint(path)
    expected = quants.dequantize(quants.quantize(tensors[name], _KINDS[kind]), _KINDS[kind])
    found = checkpoint.read("model.layers.0.mlp.down_proj.weight", 3, 9)
    assert np.array_equal(found, expected[3:9])
    assert checkpoint.quantized("model.layers.0.mlp.down_proj.weight").format == kind


def test_an_unknown_architecture_opens_but_has_no_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_write(tmp_path / "m.gguf", "falcon"))
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.header.architecture == "falcon"
    for access in (lambda: checkpoint.config, lambda: checkpoint.tensor_names):
        with pytest.raises(UnsupportedModelError, match="falcon"):
            access()


def _rope(tmp_path: Path, **changes: Any) -> RopeConfig:
    tensors = changes.pop("tensors", None)
    return open_checkpoint(_write(tmp_path / "m.gguf", "llama", tensors, **changes)).config.rope


def test_rope_scaling(tmp_path: Path) -> None:
    assert _rope(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0) == RopeConfig(
        scaling="linear", factor=4.0
    )
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    assert _rope(tmp_path, **yarn, rope__scaling__original_context_length=32) == RopeConfig(
        scaling="yarn", factor=4.0, original_max_seq_len=32
    )
    rope = _rope(tmp_path, **yarn, rope__scaling__attn_factor=0.5)
    assert rope.attention_factor == pytest.approx(0.5 * (0.1 * np.log(4) + 1))
    with pytest.raises(UnsupportedModelError, match="longrope"):
        _rope(tmp_path, rope__scaling__type="longrope")


@pytest.mark.parametrize("original", [8192, 2048, 65536])
def test_llama3_scaling_is_recovered_from_its_table(original: int, tmp_path: Path) -> None:
    rope = RopeConfig(theta=5e5, scaling="llama3", factor=32.0, original_max_seq_len=original)
    tensors = _tensors() | {"rope_freqs.weight": llama3_factors(rope, _HEAD_DIM)}
    assert _rope(tmp_path, tensors=tensors, rope__freq_base=5e5) == rope
    tensors["rope_freqs.weight"] = np.linspace(1, 9, _HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        _rope(tmp_path, tensors=tensors)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"block_count": None}, CheckpointFormatError, "block_count"),
        ({"block_count": 2}, CheckpointFormatError, "blk.1"),
        ({"block_count": 1 << 31}, CheckpointFormatError, "layers"),
        ({"embedding_length": "many"}, CheckpointFormatError, "whole number"),
        ({"embedding_length": 0}, CheckpointFormatError, "hidden_size"),
        ({"attention__head_count": 0}, CheckpointFormatError, "num_heads"),
        ({"attention__head_count": 3}, CheckpointFormatError, "multiple|even|share"),
        ({"attention__key_length": 32}, CheckpointFormatError, "shape"),
        ({"attention__layer_norm_rms_epsilon": 0.0}, CheckpointFormatError, "eps"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, CheckpointFormatError, "finite"),
        ({"rope__freq_base": -1.0}, CheckpointFormatError, "theta"),
        ({"feed_forward_length": 128}, CheckpointFormatError, "shape"),
        ({"expert_count": 8}, UnsupportedModelError, "expert"),
        ({"attention__sliding_window": 512}, UnsupportedModelError, "sliding"),
        ({"rope__dimension_count": 32}, UnsupportedModelError, "dimension_count"),
        ({"attention__head_count_kv": [2, 1]}, UnsupportedModelError, "uniform"),
        ({"split.count": 3}, UnsupportedModelError, "merge"),
    ],
)
def test_refuses(
    changes: dict[str, Any], error: type[AlborError], reason: str, tmp_path: Path
) -> None:
    path = _write(tmp_path / "m.gguf", **changes)
    with pytest.raises(error, match=reason) as caught:
        _ = open_checkpoint(path).config
    assert "\n" not in str(caught.value)


def test_refuses_tensors_that_do_not_belong(tmp_path: Path) -> None:
    extra = _tensors() | {"blk.0.attn_output.bias": np.zeros(_D, dtype=np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"attn_output\.bias"):
        _ = open_checkpoint(_write(tmp_path / "m.gguf", tensors=extra)).config
    lacking = _tensors()
    del lacking["token_embd.weight"]
    with pytest.raises(CheckpointFormatError, match="token_embd"):
        _ = open_checkpoint(_write(tmp_path / "m.gguf", tensors=lacking)).config


def test_per_layer_counts_that_agree_are_accepted(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", attention__head_count_kv=[2], feed_forward_length=[_D_FF])
    assert open_checkpoint(path).config.num_kv_heads == 2


@settings(
    deadline=2000, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_damage_to_the_header_gives_only_albor_errors(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    source = tmp_path / "sound.gguf"
    if not source.exists():
        _write(source)
    data = bytearray(source.read_bytes())
    header_bytes = open_checkpoint(source).header.data_offset  # type: ignore[attr-defined]
    for position, mask in flips:
        data[position % header_bytes] ^= mask
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    try:
        checkpoint = open_checkpoint(damaged)
        for name in checkpoint.tensor_names:
            checkpoint.read(name, 0, 2)
    except AlborError:
        pass
