"""Frozen settings: what a model is, how the engine runs, how tokens are sampled.

"auto" values are resolved before one of these is made, so that reading a field always gives
the value in force. Each class checks itself on construction and raises ConfigError (or
RequestError for SamplingParams, which comes from a client).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from albor_serve.errors import ConfigError, RequestError

__all__ = [
    "MAX_DEVICE_STOPS",
    "Architecture",
    "DevicePlan",
    "EngineConfig",
    "ModelConfig",
    "RopeConfig",
    "SamplingParams",
]

Architecture = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and its scaling for longer contexts."""

    theta: float = 10_000.0
    """Base of the geometric frequency series."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    """How many times longer the context is than the one the model was trained on."""
    original_max_seq_len: int = 0
    """Context of the original training, in tokens; needed by llama3 and yarn."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original_max_seq_len / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original_max_seq_len / this stay as they are."""
    beta_fast: float = 32.0
    """yarn: rotations over the original context above which a dimension is not interpolated."""
    beta_slow: float = 1.0
    """yarn: rotations over the original context below which a dimension is interpolated fully."""
    attention_factor: float | None = None
    """yarn: scale of cos and sin; None means 0.1·ln(factor) + 1."""

    def __post_init__(self) -> None:
        if not (self.theta > 0 and math.isfinite(self.theta)):
            raise ConfigError(f"rope theta is {self.theta}: it must be a positive number")
        if not (self.factor >= 1 and math.isfinite(self.factor)):
            raise ConfigError(f"rope scaling factor is {self.factor}: it must be at least 1")
        if self.scaling in ("llama3", "yarn") and self.original_max_seq_len <= 0:
            raise ConfigError(
                f"rope scaling {self.scaling!r} needs the original context length "
                f"(original_max_position_embeddings), which is {self.original_max_seq_len}"
            )


_MAX_SIZE = (1 << 31) - 1
"""Of any size or count of a model: kernels and GGUF keep them in 32 bits."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of one decoder-only transformer of the Llama family.

    Letters: L num_layers, H num_heads, H_kv num_kv_heads, D head_dim, d hidden_size.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    """Longest sequence the model was made for, in tokens."""
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    """Qwen2 adds a bias to the query, key and value projections."""
    qk_norm: bool = False
    """Qwen3 normalises each head's query and key before the rotation."""
    tie_embeddings: bool = False
    """The output head is the embedding matrix."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_seq_len",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(
                    f"model {name} is {value!r:.40}: it must be a positive whole number"
                )
            if value > _MAX_SIZE:
                raise ConfigError(f"model {name} is {value!r:.40}: at most {_MAX_SIZE} may be")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads: "
                f"the first number must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}: rotary embedding needs an even number")
        if not (self.rms_norm_eps > 0 and math.isfinite(self.rms_norm_eps)):
            raise ConfigError(f"rms_norm_eps is {self.rms_norm_eps}: it must be a positive number")

    @property
    def num_parameters(self) -> int:
        """Weights in the model, norms and biases included, a tied head counted once."""
        d, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        q = self.num_heads * self.head_dim
        attention = 2 * d * q + 2 * d * kv
        attention += (q + 2 * kv) if self.qkv_bias else 0
        attention += 2 * self.head_dim if self.qk_norm else 0
        layer = attention + 3 * d * self.intermediate_size + 2 * d
        heads = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return heads + self.num_layers * layer + d


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine schedules requests."""

    num_slots: int = 4
    """Sequences that run at once, each with its own KV cache of `max_seq_len` tokens."""
    max_seq_len: int = 2048
    """Tokens one sequence may hold, prompt and answer together."""
    max_queue_len: int = 64
    """Requests that may wait for a slot; one more is refused."""
    queue_timeout_ms: float = 30_000.0
    """How long a request may wait for a slot before it is refused."""
    prefill_chunk_len: int = 512
    """Most prompt tokens computed in one step when nothing else runs."""
    busy_prefill_ms: float = 40.0
    """While other sequences decode, a step's share of prefill takes about this long, so that a
    long prompt does not stall their text."""
    speculate: bool = True
    """Draft tokens by prompt lookup where the measured cost of extra rows says that it pays."""
    max_draft_len: int = 8
    """Most tokens drafted for one verify."""

    def __post_init__(self) -> None:
        limits = {
            "num_slots": (1, 64),
            "max_seq_len": (8, 1 << 20),
            "max_queue_len": (0, 1 << 16),
            "prefill_chunk_len": (1, 1 << 16),
            "max_draft_len": (0, 63),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(
                    f"{name} is {value!r}: it must be a whole number, {low} to {high}"
                )
        for name in ("queue_timeout_ms", "busy_prefill_ms"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(
                    f"{name} is {value!r}: it must be a positive number of milliseconds"
                )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the logits.

    The order is: logit_bias and penalties, then temperature, top_k, top_p, min_p, then one draw.
    Raises RequestError, with `param` set, for a value outside its range.
    """

    temperature: float = 1.0
    """0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens already present, multiply negative ones (Keskar 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time the token was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit) pairs."""
    seed: int | None = None
    """Same seed, same text on the same backend; None draws a fresh one."""
    num_logprobs: int | None = None
    """Report the chosen token's log-probability and those of this many most likely tokens; None
    reports none."""

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0 <= self.top_k <= 1 << 24:
            raise RequestError("top_k must be a whole number, 0 or more", param="top_k")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise RequestError("seed must fit into 64 bits", param="seed")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= 20:
            raise RequestError("logprobs must be a whole number, 0 to 20", param="logprobs")
        for _, bias in self.logit_bias:
            _check_range("logit_bias", bias, -100.0, 100.0)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1


MAX_DEVICE_STOPS = 32
"""Stop tokens that a device looks for."""


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What a device may decode by itself, without asking the host."""

    sampling: SamplingParams
    max_new_tokens: int
    seed: int = 0
    """Of the draws, 64 bits; sampling.seed is not looked at."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens after which nothing comes; they are part of the result."""
    banned: tuple[int, ...] = ()
    """Tokens that are never chosen."""
    prompt: tuple[int, ...] = ()
    """Tokens that the repetition penalty applies to from the start."""
    counts: tuple[tuple[int, int], ...] = ()
    """(token id, how often it was generated before)."""

    @property
    def adjusts(self) -> bool:
        """Whether penalties, a bias or a ban change the logits."""
        rules = self.sampling
        penalties = rules.repetition_penalty != 1.0 or rules.frequency_penalty
        return bool(penalties or rules.presence_penalty or rules.logit_bias or self.banned)


def _check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False
) -> None:
    inside = low < value <= high if open_low else low <= value <= high
    if not inside:  # also catches NaN, for which every comparison is false
        rule = f"above {low:g} and at most {high:g}" if open_low else f"{low:g} to {high:g}"
        raise RequestError(f"{name} must be a number, {rule}", param=name)
