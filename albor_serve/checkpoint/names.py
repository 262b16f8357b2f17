"""Tensor names: what a model of a given config consists of, in both vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from albor_serve.config import ModelConfig

__all__ = ["gguf_name", "rotary_order", "rotary_rows", "tensor_shapes"]

_TOP_NAMES: Final[Mapping[str, str]] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES: Final[Mapping[str, str]] = {
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


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model under its Hugging Face name, with its shape, in file order.

    Matrices are [out, in]. A tied head is left out.
    """
    d, d_ff = config.hidden_size, config.intermediate_size
    d_q = config.num_heads * config.head_dim
    d_kv = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for layer in range(config.num_layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (d_q, d),
            "self_attn.k_proj.weight": (d_kv, d),
            "self_attn.v_proj.weight": (d_kv, d),
            "self_attn.o_proj.weight": (d, d_q),
        }
        if config.qkv_bias:
            parts["self_attn.q_proj.bias"] = (d_q,)
            parts["self_attn.k_proj.bias"] = (d_kv,)
            parts["self_attn.v_proj.bias"] = (d_kv,)
        if config.qk_norm:
            parts["self_attn.q_norm.weight"] = (config.head_dim,)
            parts["self_attn.k_norm.weight"] = (config.head_dim,)
        parts["post_attention_layernorm.weight"] = (d,)
        parts["mlp.gate_proj.weight"] = (d_ff, d)
        parts["mlp.up_proj.weight"] = (d_ff, d)
        parts["mlp.down_proj.weight"] = (d, d_ff)
        shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in parts.items()})
    shapes["model.norm.weight"] = (d,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor from `tensor_shapes`. KeyError for any other name."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    prefix, _, rest = name.partition("model.layers.")
    layer, _, part = rest.partition(".")
    module, _, kind = part.rpartition(".")
    if prefix or not layer.isdigit() or kind not in ("weight", "bias"):
        raise KeyError(name)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def rotary_rows(config: ModelConfig, name: str) -> int:
    """Heads whose rows GGUF stores in another order, or 0.

    llama.cpp rotates neighbouring channels for the llama architecture, Hugging Face rotates
    channel i with i + D/2; so GGUF interleaves the two halves of each query and key head.
    """
    if config.architecture != "llama":
        return 0
    if ".self_attn.q_proj." in name:
        return config.num_heads
    if ".self_attn.k_proj." in name:
        return config.num_kv_heads
    return 0


def rotary_order(num_rows: int, num_heads: int) -> npt.NDArray[np.intp]:
    """For each row as Hugging Face orders them, its position in the file."""
    order = np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2)
    return order.swapaxes(1, 2).reshape(-1)
