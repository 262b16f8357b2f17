"""Models of random Q4_0 weights: for tests and benchmarks that need a shape, not a meaning."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
import torch

from albor_serve.config import ModelConfig
from albor_serve.errors import CheckpointFormatError
from albor_serve.kernels.layout import GROUP_SIZE
from albor_serve.kernels.weights import DecodeWeights, pack_weights, random_q4_0

__all__ = ["RandomModel"]

_Q4 = npt.NDArray[np.uint8]


class RandomModel:
    """Weights by Hugging Face name, the same for the same seed whatever the order of reading."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self._seed = seed

    def q4_rows(self, name: str) -> _Q4:
        """Q4_0 rows of a matrix, uint8 [N, K / 32 * 18]."""
        c = self.config
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        shapes = {
            "embed_tokens": (c.vocab_size, c.hidden_size),
            "lm_head": (c.vocab_size, c.hidden_size),
            "q_proj": (q_size, c.hidden_size),
            "k_proj": (kv_size, c.hidden_size),
            "v_proj": (kv_size, c.hidden_size),
            "o_proj": (c.hidden_size, q_size),
            "gate_proj": (c.intermediate_size, c.hidden_size),
            "up_proj": (c.intermediate_size, c.hidden_size),
            "down_proj": (c.hidden_size, c.intermediate_size),
        }
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind not in shapes:
            raise CheckpointFormatError(f"a random model has no matrix {name!r}")
        return random_q4_0(*shapes[kind], self._generator(name))

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """Norm gains, float32, near 1."""
        c = self.config
        per_head = name.endswith(("q_norm.weight", "k_norm.weight"))
        size = c.head_dim if per_head else c.hidden_size
        return self._generator(name).uniform(0.5, 1.5, size).astype(np.float32)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Any tensor in float32, as `albor_serve.model.load_decoder` wants it."""
        if name.endswith("norm.weight"):
            return self.vector(name)
        rows = self.q4_rows(name)
        groups = rows.reshape(rows.shape[0], -1, 18)
        scales = np.ascontiguousarray(groups[:, :, :2]).view(np.float16).astype(np.float32)
        codes = np.concatenate([groups[:, :, 2:] & 15, groups[:, :, 2:] >> 4], axis=2)
        weights = (codes.astype(np.float32) - 8.0) * scales
        return weights.reshape(rows.shape[0], groups.shape[1] * GROUP_SIZE)

    def pack(self, device: torch.device | str, max_seq_len: int) -> DecodeWeights:
        """The same weights in the kernels' layout."""
        c = self.config
        names = ["model.norm.weight"]
        for i in range(c.num_layers):
            prefix = f"model.layers.{i}."
            names += [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"]
            if c.qk_norm:
                names += [f"{prefix}self_attn.{n}_norm.weight" for n in "qk"]
        vectors = {name: self.vector(name) for name in names}
        return pack_weights(c, self.q4_rows, vectors, device=device, max_seq_len=max_seq_len)

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(name.encode())])
