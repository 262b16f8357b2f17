"""What a spec would do: sizes, memory, schedule. Reads nothing but the spec and its lock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from albor_serve.config import ModelConfig
from albor_train.optim import learning_rate
from albor_train.sources import read_lock
from albor_train.spec import Spec, TrainSpec
from albor_train.train import flops_per_token

__all__ = ["MemoryEstimate", "estimate_memory", "plan_lines"]

_Q4_BITS: Final = 4.5
_SAFETY: Final = 1.15


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that one device needs at its peak."""

    weights: int
    """float32 weights and their copy in the compute dtype."""
    optimizer: int
    gradients: int
    """float32 sums and one micro-batch's own, with the sum's temporary copy."""
    activations: int
    """What one micro-batch keeps for its backward pass."""
    loss: int
    """One chunk of logits, and the gradients of hidden states and head."""
    update: int
    """Temporaries of the largest stacked Muon update."""

    @property
    def total(self) -> int:
        """Sum with a margin of 15 %. Backward and update never happen at once."""
        passing = max(self.activations + self.loss, self.update)
        return int(_SAFETY * (self.weights + self.optimizer + self.gradients + passing))


def estimate_memory(config: ModelConfig, train: TrainSpec) -> MemoryEstimate:
    """An upper estimate of a device's peak.

    Compiled, the float32 parts of norms and what is cheap to compute again are not kept.
    """
    size = 2 if train.dtype == "bfloat16" else 4
    count = config.num_parameters
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = config.num_layers * (2 * d * q + 2 * d * kv + 3 * d * f)
    averaged = 4 * count if train.ema > 0 else 0
    if train.optimizer == "muon":
        moments = 4 * matrices + 8 * (count - matrices)
        largest = config.num_layers * max(d * f, d * q)
        update = 4 * largest * 4
    else:
        moments, update = 8 * count, 4 * config.vocab_size * d * 3
    rows = train.micro_batch_rows * train.sequence_len
    # A norm keeps its input, that in float32, the root and the scaled copy.
    norms = 2 * d * (2 * size + 8)
    if config.qk_norm:
        norms += (q + kv) * (2 * size + 8)
    attention = size * (2 * d + 6 * q + 8 * kv)
    if train.attention == "document_mask":
        # Without a fused kernel for it, scores and probabilities exist in full.
        attention += config.num_heads * train.sequence_len * (2 * size + 4)
    feed_forward = size * (2 * d + 5 * f)
    if train.compile and train.attention != "document_mask":
        norms = 3 * size * d
        attention = size * (2 * d + 4 * q + 8 * kv) + 4 * config.num_heads
        feed_forward = size * (d + 4 * f)
    per_token = config.num_layers * (norms + attention + feed_forward) + d * (4 * size + 8)
    head = config.vocab_size * d
    chunk = min(rows, train.loss_chunk_tokens) * config.vocab_size
    return MemoryEstimate(
        weights=(4 + size) * count,
        optimizer=moments + averaged,
        gradients=(4 + size + 4) * count,
        activations=rows * per_token + 24 * rows,
        loss=chunk * (2 * size + 12) + rows * d * size + head * (4 + 2 * size),
        update=update,
    )


def plan_lines(spec: Spec) -> list[str]:
    """The plan, one line each.

    Raises:
        DataError: the lock file can't be read.
    """
    config, train = spec.model_config, spec.train
    memory = estimate_memory(config, train)
    rows = train.batch_tokens // train.sequence_len
    tokens = train.steps * train.batch_tokens
    epoch_rows = -(-train.steps * rows // train.epochs)
    width = config.num_heads * config.head_dim
    flops = flops_per_token(config) + 6.0 * config.num_layers * width * train.sequence_len
    return [
        f"{spec.name}   spec {spec.hash[:12]}, seed {spec.seed}",
        "",
        f"data       {_sources(spec)}; held out: {', '.join(spec.data.held_out) or 'nothing'}",
        f"tokenizer  byte-level BPE, {spec.tokenizer.vocab_size:,} tokens",
        (
            f"model      {config.architecture}, {config.num_layers} layers x {config.hidden_size}, "
            f"heads {config.num_heads}/{config.num_kv_heads} of {config.head_dim}, feed-forward "
            f"{config.intermediate_size}"
        ),
        (
            f"           {config.num_parameters:,} parameters; "
            f"{config.num_parameters * _Q4_BITS / 8e6:.0f} MB at Q4_0"
        ),
        (
            f"batch      {train.batch_tokens:,} tokens = {rows} rows of {train.sequence_len}, "
            f"{rows // train.micro_batch_rows} micro-batches of {train.micro_batch_rows} rows"
        ),
        (
            f"run        {train.steps:,} steps, {tokens / 1e6:,.0f}M tokens, {train.epochs} epochs "
            f"at most: one epoch must hold {epoch_rows:,} rows"
        ),
        (
            f"compute    {flops * tokens:.2e} FLOPs, one H100 {_hours(flops * tokens, 0.45)} at "
            f"45 % of its peak, {_hours(flops * tokens, 0.325)} at 32.5 %"
        ),
        (
            f"schedule   {train.optimizer}, {train.schedule}, warm-up {train.warmup_steps} steps "
            f"({train.warmup_steps / train.steps:.1%}), ends at step {train.steps}"
        ),
        "           "
        + ", ".join(
            f"step {step}: {learning_rate(train, step):.2e}" for step in _milestones(train)
        ),
        (
            f"memory     {memory.total / 2**30:.1f} GiB a device: weights "
            f"{memory.weights / 2**30:.1f}, optimizer {memory.optimizer / 2**30:.1f}, gradients "
            f"{memory.gradients / 2**30:.1f}, activations {memory.activations / 2**30:.1f}, loss "
            f"{memory.loss / 2**30:.1f}"
        ),
        f"evaluate   {', '.join(spec.evaluate.benchmarks) or 'held-out text only'}",
    ]


def _sources(spec: Spec) -> str:
    parts = []
    if spec.data.lock:
        parts.append(f"{len(read_lock(spec.path(spec.data.lock)))} pinned packages")
    if spec.data.folders:
        parts.append(f"{len(spec.data.folders)} folders")
    return " and ".join(parts)


def _milestones(train: TrainSpec) -> list[int]:
    steps = {0, train.warmup_steps, train.steps // 2, 3 * train.steps // 4, train.steps - 1}
    return sorted(step for step in steps if 0 <= step < train.steps)


def _hours(flops: float, share: float) -> str:
    seconds = flops / (share * 989e12)
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 10_800 else f"{seconds / 3600:.1f} h"
