"""Tiny random models and a tiny tokenizer, for every test that needs a real checkpoint.

    config, weights = tiny_model("qwen3", seed=1)
    folder = save_hf_folder(tmp_path / "model", config, weights)
    gguf = save_gguf(tmp_path / "model.gguf", config, weights, file_type="F16")

`weights` maps Hugging Face tensor names to float32 arrays; `reader(weights)` turns it into the
`read` function that the backends take. The same arguments always give the same weights.
"""

from __future__ import annotations

import functools
import heapq
import inspect
import json
import math
import string
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from albor_serve.config import Architecture, ModelConfig, RopeConfig

__all__ = [
    "ARCHITECTURES",
    "ROPE_SCALINGS",
    "SPECIALS",
    "Weights",
    "add_vocabulary",
    "hf_config",
    "random_tokens",
    "reader",
    "save_gguf",
    "save_hf_folder",
    "save_hf_weights",
    "tiny_model",
    "tiny_tokenizer_json",
]

FloatArray = npt.NDArray[np.float32]
Weights = dict[str, FloatArray]
FileType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]

ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3")

SPECIALS: dict[str, int] = {
    "<|endoftext|>": 0,
    "<|fim_prefix|>": 1,
    "<|fim_middle|>": 2,
    "<|fim_suffix|>": 3,
    "<|fim_pad|>": 4,
    "<|repo_name|>": 5,
    "<|file_sep|>": 6,
    "<|im_start|>": 7,
    "<|im_end|>": 8,
}
"""Control tokens of the tiny tokenizer and their ids; the first seven as in albor's own models."""

ROPE_SCALINGS: dict[str, RopeConfig] = {
    "none": RopeConfig(theta=10_000.0),
    "linear": RopeConfig(theta=10_000.0, scaling="linear", factor=4.0),
    "llama3": RopeConfig(
        theta=500_000.0,
        scaling="llama3",
        factor=8.0,
        original_max_seq_len=64,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    "yarn": RopeConfig(theta=10_000.0, scaling="yarn", factor=4.0, original_max_seq_len=64),
}
"""One rope setting of each kind, fit for the tiny models' 256 positions."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer; llama.cpp knows it as tokenizer.ggml.pre = "qwen2"."""


def tiny_model(
    arch: Architecture = "qwen3", seed: int = 0, **overrides: Any
) -> tuple[ModelConfig, Weights]:
    """A random model of about 100,000 parameters.

    Args:
        arch: "llama", "qwen2" (biases, untied head) or "qwen3" (qk-norm, tied head, head_dim
            larger than hidden_size / num_heads).
        seed: of the weights.
        overrides: fields of ModelConfig that differ from the defaults.

    Returns:
        The configuration and the weights under their Hugging Face names. The logits have a
        standard deviation of about 2, so the most likely token is rarely in doubt.
    """
    base = ModelConfig(
        architecture=arch,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32 if arch == "qwen3" else 16,
        max_seq_len=256,
        rms_norm_eps=1e-5 if arch == "llama" else 1e-6,
        rope=RopeConfig(theta=10_000.0),
        qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
        tie_embeddings=arch == "qwen3",
        bos_token_id=SPECIALS["<|endoftext|>"],
        eos_token_ids=(SPECIALS["<|endoftext|>"],),
    )
    config = replace(base, **overrides)
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> FloatArray:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    def matrix(rows: int, cols: int, gain: float = 1.0) -> FloatArray:
        return normal(rows, cols, std=gain / math.sqrt(cols))

    def norm(size: int) -> FloatArray:
        return (1.0 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    d, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    # The gain of 2 on queries and keys makes attention peaked, so that a wrong mask or a wrong
    # position shows in the logits.
    weights: Weights = {"model.embed_tokens.weight": matrix(config.vocab_size, d, gain=2.0)}
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}."
        weights[name + "input_layernorm.weight"] = norm(d)
        weights[name + "self_attn.q_proj.weight"] = matrix(q_size, d, gain=2.0)
        weights[name + "self_attn.k_proj.weight"] = matrix(kv_size, d, gain=2.0)
        weights[name + "self_attn.v_proj.weight"] = matrix(kv_size, d)
        if config.qkv_bias:
            for proj, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                weights[f"{name}self_attn.{proj}_proj.bias"] = normal(size, std=0.5)
        if config.qk_norm:
            weights[name + "self_attn.q_norm.weight"] = norm(head_dim)
            weights[name + "self_attn.k_norm.weight"] = norm(head_dim)
        weights[name + "self_attn.o_proj.weight"] = matrix(d, q_size)
        weights[name + "post_attention_layernorm.weight"] = norm(d)
        weights[name + "mlp.gate_proj.weight"] = matrix(config.intermediate_size, d)
        weights[name + "mlp.up_proj.weight"] = matrix(config.intermediate_size, d)
        weights[name + "mlp.down_proj.weight"] = matrix(d, config.intermediate_size)
    weights["model.norm.weight"] = norm(d)
    if not config.tie_embeddings:
        weights["lm_head.weight"] = matrix(config.vocab_size, d, gain=2.0)
    return config, weights


def reader(weights: Mapping[str, FloatArray]) -> Callable[[str], FloatArray]:
    """The `read` function of a checkpoint that holds these weights."""
    return lambda name: weights[name]


def random_tokens(config: ModelConfig, count: int, seed: int = 0) -> list[int]:
    """`count` ordinary token ids (none of the control tokens)."""
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(16, config.vocab_size, size=count)]


@functools.cache
def tiny_tokenizer_json(vocab_size: int = 512) -> str:
    """Text of a tokenizer.json: byte-level BPE trained on a little Python source.

    It has Qwen2's pre-tokenizer, the control tokens of `SPECIALS` (ids 0 to 8, and reserved ones
    up to 15) and tokens for runs of up to 128 spaces, which are longer than some buffers.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{i}|>" for i in range(len(SPECIALS), 16)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *reserved],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = "\n".join(inspect.getsource(module) for module in (textwrap, string, heapq))
    tokenizer.train_from_iterator([source, *[" " * 128] * 400], trainer)
    return cast("str", tokenizer.to_str(pretty=False))


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says for this model, in the spelling most published checkpoints use."""
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    eos = list(config.eos_token_ids)
    data: dict[str, Any] = {
        "architectures": [names[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _hf_rope_scaling(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "torch_dtype": "float32",
    }
    if config.architecture != "qwen2":  # Qwen2's biases are part of the architecture
        data["attention_bias"] = False
    if config.architecture != "llama":
        data["use_sliding_window"] = False
    return data


def save_hf_folder(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, FloatArray],
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    tokenizer_json: str | None = None,
) -> Path:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    `tokenizer_json` defaults to the tiny tokenizer; returns `folder`, which is made if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = hf_config(config) | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(data, indent=1))
    (folder / "tokenizer.json").write_text(tokenizer_json or tiny_tokenizer_json())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|fim_pad|>",
        "add_bos_token": False,
        "model_max_length": config.max_seq_len,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    save_hf_weights(folder / "model.safetensors", weights, dtype=dtype)
    return folder


def save_hf_weights(
    path: Path,
    weights: Mapping[str, FloatArray],
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Write one safetensors file. The format is 8 bytes of header length, JSON, then raw data."""
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    offset = 0
    for name, array in weights.items():
        chunk = _as_bytes(array, dtype)
        header[name] = {
            "dtype": codes[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(chunk)],
        }
        offset += len(chunk)
        chunks.append(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def save_gguf(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, FloatArray],
    *,
    file_type: FileType = "F32",
    tokenizer_json: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a GGUF file that llama.cpp loads; matrices in `file_type`, vectors in F32.

    `metadata` adds or replaces whole keys (str, bool, int or float values), for example
    {"tokenizer.ggml.pre": "gpt-2"}. Ids above the tokenizer's are written as unused, as
    published files do for padded embeddings. Returns `path`.
    """
    import gguf

    arch = config.architecture
    writer = gguf.GGUFWriter(path, arch)
    try:
        writer.add_name(f"tiny {arch}")
        writer.add_context_length(config.max_seq_len)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
        _add_rope(writer, config)
        add_vocabulary(writer, config, tokenizer_json)
        for key, value in (metadata or {}).items():
            _add_value(writer, key, value)
        for name, array in weights.items():
            _add_tensor(writer, config, name, array, file_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return path


def _as_bytes(array: FloatArray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
        # Round to nearest, ties to even: the low half decides.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(array, dtype={"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


def _hf_rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    data: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        data["original_max_position_embeddings"] = rope.original_max_seq_len
    if rope.scaling == "llama3":
        data["low_freq_factor"] = rope.low_freq_factor
        data["high_freq_factor"] = rope.high_freq_factor
    if rope.scaling == "yarn":
        data["beta_fast"] = rope.beta_fast
        data["beta_slow"] = rope.beta_slow
        if rope.attention_factor is not None:
            data["attention_factor"] = rope.attention_factor
    return data


def _add_rope(writer: Any, config: ModelConfig) -> None:
    import gguf

    rope = config.rope
    writer.add_rope_freq_base(rope.theta)
    if rope.scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.scaling == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_seq_len)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    elif rope.scaling == "llama3":
        # llama.cpp takes llama3 scaling as one divisor for each rotation frequency.
        divisors = []
        for i in range(config.head_dim // 2):
            wavelength = 2 * math.pi * rope.theta ** (2 * i / config.head_dim)
            turns = rope.original_max_seq_len / wavelength
            blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            blend = min(1.0, max(0.0, blend))
            divisors.append(1.0 / ((1.0 - blend) / rope.factor + blend))
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))


def add_vocabulary(writer: Any, config: ModelConfig, tokenizer_json: str | None = None) -> None:
    """Write a byte-level tokenizer (the tiny one by default) into a gguf.GGUFWriter."""
    import gguf

    data = json.loads(tokenizer_json or tiny_tokenizer_json())
    spellings = {token_id: text for text, token_id in data["model"]["vocab"].items()}
    types = dict.fromkeys(spellings, gguf.TokenType.NORMAL)
    for added in data["added_tokens"]:
        spellings[added["id"]] = added["content"]
        control = added["special"]
        types[added["id"]] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    ids = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([spellings.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([types.get(i, gguf.TokenType.UNUSED) for i in ids])
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_add_bos_token(False)


def _add_value(writer: Any, key: str, value: str | bool | int | float) -> None:
    for shard in writer.kv_data:
        shard.pop(key, None)
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_LAYER_NAMES[stem]}.{kind}"


def _add_tensor(
    writer: Any, config: ModelConfig, name: str, array: FloatArray, file_type: FileType
) -> None:
    import gguf

    if config.architecture == "llama":
        # GGUF's llama rotates neighbouring pairs of channels, Hugging Face's the two halves.
        if "q_proj" in name:
            array = _pairs(array, config.num_heads)
        elif "k_proj" in name:
            array = _pairs(array, config.num_kv_heads)
    if array.ndim == 1 or file_type == "F32":
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    elif file_type == "F16":
        writer.add_tensor(_gguf_name(name), array.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType[file_type]
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)


def _pairs(array: FloatArray, num_heads: int) -> FloatArray:
    rows = array.shape[0] // num_heads // 2
    split = array.reshape(num_heads, 2, rows, *array.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))
