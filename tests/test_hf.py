"""checkpoint/hf.py: folders are read as transformers reads them, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor_serve.checkpoint import open_checkpoint
from albor_serve.checkpoint.hf import model_config_from_hf
from albor_serve.config import RopeConfig
from albor_serve.errors import (
    AlborError,
    CheckpointError,
    CheckpointFormatError,
    UnsupportedModelError,
)
from tests.fixtures_checkpoint import save_tiny_model, write_safetensors

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN2 = _LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = _LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_reads_the_weights_that_transformers_saved(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    model = save_tiny_model(tmp_path, architecture, dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.name) == ("hf", tmp_path.name)
    expected = {name: value.detach().numpy() for name, value in model.named_parameters()}
    assert set(checkpoint.tensor_names) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(checkpoint.read(name), value)
        assert np.array_equal(checkpoint.read(name, 1, 5), value[1:5])
        assert checkpoint.shape(name) == value.shape
    stored = checkpoint.quantized("model.embed_tokens.weight")
    assert stored.format == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    total = sum(value.size for value in expected.values())
    assert checkpoint.config.num_parameters == total


def test_reads_a_sharded_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = save_tiny_model(tmp_path, "qwen2")
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    for name, value in model.named_parameters():
        assert np.array_equal(checkpoint.read(name), value.detach().numpy())
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x"])
def test_index_cannot_point_outside_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA))
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointFormatError, match="beside it"):
        open_checkpoint(tmp_path)


def test_defaults_and_shapes() -> None:
    config = model_config_from_hf(_LLAMA)
    assert (config.head_dim, config.num_kv_heads, config.tie_embeddings) == (16, 2, False)
    assert (config.bos_token_id, config.eos_token_ids, config.qkv_bias) == (1, (2,), False)
    assert model_config_from_hf(_QWEN3).head_dim == 128
    assert model_config_from_hf(_QWEN3 | {"head_dim": 24}).head_dim == 24
    assert model_config_from_hf(_QWEN2).qkv_bias
    assert model_config_from_hf(_QWEN3).qk_norm
    without = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
    assert model_config_from_hf(without).num_kv_heads == 4


def test_end_tokens_come_from_both_files() -> None:
    config = model_config_from_hf(_QWEN2, {"eos_token_id": [7, 2, 9]})
    assert config.eos_token_ids == (7, 2, 9)
    assert model_config_from_hf(_QWEN2 | {"eos_token_id": None}).eos_token_ids == ()


_SCALINGS: list[tuple[dict[str, Any], RopeConfig]] = [
    ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
    ({"rope_theta": None}, RopeConfig()),
    ({"rope_scaling": None}, RopeConfig()),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeConfig(scaling="linear", factor=4.0)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeConfig(theta=1e6)),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
        RopeConfig(scaling="llama3", factor=8.0, original_max_seq_len=512),
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        RopeConfig(scaling="yarn", factor=2.0, original_max_seq_len=2048),
    ),
]


@pytest.mark.parametrize(("changes", "rope"), _SCALINGS)
def test_rope_in_old_and_new_spelling(changes: dict[str, Any], rope: RopeConfig) -> None:
    assert model_config_from_hf(_LLAMA | changes).rope == rope


def test_yarn_widens_the_context_and_derives_the_attention_factor() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert model_config_from_hf(_QWEN2 | {"rope_scaling": yarn}).max_seq_len == 8192
    scales = {"mscale": 1.0, "mscale_all_dim": 0.5}
    rope = model_config_from_hf(_QWEN2 | {"rope_scaling": yarn | scales}).rope
    growth = 0.1 * np.log(4)
    assert rope.attention_factor == pytest.approx((growth + 1) / (growth * 0.5 + 1))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (_LLAMA | {"model_type": "mixtral"}, "model_type"),
        (_LLAMA | {"model_type": None}, "model_type"),
        (_LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        (_LLAMA | {"hidden_act": "gelu"}, "hidden_act"),
        (_LLAMA | {"attention_bias": True}, "attention_bias"),
        (_LLAMA | {"mlp_bias": True}, "mlp_bias"),
        (_LLAMA | {"num_local_experts": 8}, "experts"),
        (_LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        (_LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary"),
        (_LLAMA | {"sliding_window": 4096}, "sliding"),
        (
            _QWEN2 | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "slid",
        ),
        (_QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]}, "slid"),
        (_LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (_LLAMA | {"rope_scaling": {"type": "longrope"}}, "longrope"),
        (_LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        (_LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "layers"),
    ],
)
def test_refuses_what_albor_does_not_run(raw: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        model_config_from_hf(raw)


def test_a_sliding_window_that_is_not_in_use_is_no_obstacle() -> None:
    idle = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
    assert model_config_from_hf(_QWEN2 | idle).num_layers == 2
    late = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}
    assert model_config_from_hf(_QWEN2 | late).num_layers == 2
    assert model_config_from_hf(_QWEN3 | {"layer_types": ["full_attention"] * 2}).num_layers == 2


@settings(max_examples=300)
@given(
    base=st.sampled_from([_LLAMA, _QWEN2, _QWEN3]),
    key=st.sampled_from([*_LLAMA, "head_dim", "rope_scaling", "rope_parameters", "layer_types"]),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
        st.lists(st.integers(), max_size=2),
        st.dictionaries(
            st.sampled_from(["type", "rope_type", "factor", "rope_theta", "mscale", "truncate",
                             "original_max_position_embeddings", "low_freq_factor"]),
            st.one_of(st.none(), st.integers(), st.floats(), st.sampled_from(["yarn", "llama3"])),
        ),
    ),
)  # fmt: skip
def test_odd_values_give_a_config_or_a_clear_error(
    base: dict[str, Any], key: str, value: object
) -> None:
    try:
        config = model_config_from_hf(base | {key: value})
    except AlborError as error:
        text = str(error)
        assert text == text.strip()
        assert "\n" not in text
    else:
        assert config.num_parameters > 0


def _minimal_folder(folder: Path) -> dict[str, np.ndarray]:
    raw = _LLAMA | {"num_hidden_layers": 1, "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(raw))
    prefix = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (32, 64),
        f"{prefix}input_layernorm.weight": (64,),
        f"{prefix}self_attn.q_proj.weight": (64, 64),
        f"{prefix}self_attn.k_proj.weight": (32, 64),
        f"{prefix}self_attn.v_proj.weight": (32, 64),
        f"{prefix}self_attn.o_proj.weight": (64, 64),
        f"{prefix}post_attention_layernorm.weight": (64,),
        f"{prefix}mlp.gate_proj.weight": (96, 64),
        f"{prefix}mlp.up_proj.weight": (96, 64),
        f"{prefix}mlp.down_proj.weight": (64, 96),
        "model.norm.weight": (64,),
        "lm_head.weight": (32, 64),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_tensors_must_match_the_config(tmp_path: Path) -> None:
    tensors = _minimal_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors)
    assert open_checkpoint(tmp_path).config.num_layers == 1
    write_safetensors(path, {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(CheckpointFormatError, match="tie_word_embeddings"):
        open_checkpoint(tmp_path)
    write_safetensors(path, tensors | {"model.norm.weight": np.zeros(65)})
    with pytest.raises(CheckpointFormatError, match="shape"):
        open_checkpoint(tmp_path)
    write_safetensors(path, tensors | {"model.layers.0.self_attn.o_proj.bias": np.zeros(64)})
    with pytest.raises(UnsupportedModelError, match=r"o_proj\.bias"):
        open_checkpoint(tmp_path)
    ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8)}
    write_safetensors(path, tensors | ignored)
    assert "lm_head.weight" in open_checkpoint(tmp_path).tensor_names


def test_refuses_folders_without_usable_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "some.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"some\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(CheckpointError, match="run code"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="give its folder"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b"nul", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000, b"9" * 6000],
)
def test_broken_config_json(text: bytes, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", _minimal_folder(tmp_path))
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointFormatError, match="JSON") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_context_beyond_32_bits() -> None:
    yarn = {"type": "yarn", "factor": 1 << 31, "original_max_position_embeddings": 2048}
    with pytest.raises(CheckpointFormatError, match="at most"):
        model_config_from_hf({**_LLAMA, "rope_scaling": yarn})
