"""Times training steps of several variants in one process, so that their ratios mean something.

Rows are random tokens cut into documents of a corpus-like length: speed does not depend on what
they say, and no data has to be at hand. A variant is a name with options:

    plain                the decoder compiled, bfloat16 weights, full logits, causal, fused AdamW
    nanogpt              a GPT-2 of equal width and depth under autocast: what nanoGPT does
    ours                 the trainer as the spec says
    ours:KEY=VALUE,...   with one thing changed, see `OPTIONS`
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from albor_serve.config import ModelConfig
from albor_serve.model import Decoder
from albor_train.batches import RowStream
from albor_train.errors import TrainingError
from albor_train.loss import IGNORED
from albor_train.optim import orthogonalize
from albor_train.pack import Pack
from albor_train.spec import ModelSpec, Spec, TrainSpec, check_spec
from albor_train.train import Trainer, flops_per_token, initial_weights, peak_flops
from albor_train.world import World

__all__ = ["DEFAULT_VARIANTS", "OPTIONS", "BenchRow", "bench", "profile", "table"]

OPTIONS: Final = {
    "attention": "document_varlen, document_flex, document_mask or causal",
    "rows": "rows of one micro-batch",
    "chunk": "rows of logits at one time",
    "optimizer": "muon or adamw",
    "mode": "torch.compile's mode, such as max-autotune-no-cudagraphs, or off",
    "muon": "compiled: the orthogonalization through torch.compile",
    "fused": "on: one product for query, key and value, one for gate and up; or off",
    "kernels": "own: SwiGLU and heads by operators that the compiler can't look into; or torch",
    "sdpa": "library of causal attention: any, cudnn or flash",
    "head_dim": "size of a head; their number changes so that the width stays",
    "fp8": "on: the blocks' forward products in eight bits (MFU still of the bfloat16 peak)",
    "layers": "number of layers",
    "width": "hidden size; heads and feed-forward grow with it",
    "batch": "tokens of one step",
    "deterministic": "on: only algorithms that give the same bits each time",
}
"""What a variant of ours may change."""

DEFAULT_VARIANTS: Final = (
    "plain",
    "nanogpt",
    "ours",
    "ours:attention=causal",
    "ours:attention=document_flex",
    "ours:chunk=4096",
    "ours:chunk=16384",
    "ours:rows=32",
    "ours:optimizer=adamw",
    "ours:muon=compiled",
    "ours:mode=max-autotune-no-cudagraphs",
    "ours:fused=on",
    "ours:fused=on,rows=32,muon=compiled",
    "ours:fused=on,head_dim=128,rows=32,muon=compiled",
    "ours:fused=on,head_dim=128,rows=32,muon=compiled,batch=524288",
)

_MEAN_DOCUMENT: Final = 1100
_STEPS: Final = 4
"""Steps whose rows there are; then they come again."""
_END, _PAD = 0, 4


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One variant's figures. Times are medians over the timed steps."""

    variant: str
    tokens_per_s: float
    mfu: float
    """Of the device's dense bfloat16 peak, by the variant's own floating-point operations: six for
    each multiplied weight and token, attention only where tokens see each other; 0 if the peak is
    not known."""
    step_ms: float
    update_ms: float
    """Clipping, optimizer and the copy to the compute dtype; 0 where not told apart."""
    first_ms: float
    """The first step, compilation included."""
    memory_bytes: int
    loss: float
    """After the last step; on random tokens near the logarithm of the vocabulary."""
    digest: str = ""
    """Of ours: start of the SHA-256 of the weights after the last step. Two rows of a variant with
    the same digest did the same to the bit."""
    problem: str = ""
    """Why there are no figures."""


Step = Callable[[int], float]
"""Does step number n and returns its loss."""

_Made = tuple[Step, Callable[[int], float], list[float], Callable[[], str]]
"""A variant's step, the operations of one step, a list that gets update times in ms, and the digest
of its weights."""


def bench(
    spec: Spec,
    variants: Sequence[str],
    *,
    device: torch.device,
    steps: int = 8,
    batch_tokens: int | None = None,
    max_seconds: float = 280.0,
    say: Callable[[str], None] = lambda _: None,
) -> list[BenchRow]:
    """Time the variants one after the other; those that fail or come too late are rows too.

    Args:
        steps: timed steps of each, after two that are not.
        batch_tokens: tokens of one step instead of the spec's.
        max_seconds: begin no variant after so long.

    Raises:
        TrainingError: a variant or option is unknown.
    """
    for variant in variants:
        _parse(variant)
    began = time.perf_counter()
    rows: list[BenchRow] = []
    for variant in variants:
        if time.perf_counter() - began > max_seconds:
            rows.append(_failed(variant, f"not begun: {max_seconds:g} s had passed"))
            continue
        try:
            row = _measure(_variant_of(spec, variant, batch_tokens), variant, device, steps)
        # A variant that a release of torch lacks, or that does not fit, must not end the rest.
        except Exception as error:  # noqa: BLE001
            reason = " ".join(str(error).split())[:200]
            row = _failed(variant, f"{type(error).__name__}: {reason}")
        finally:
            torch.use_deterministic_algorithms(False)
        rows.append(row)
        say(_line(row))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()
    return rows


def profile(spec: Spec, variant: str, *, device: torch.device, batch_tokens: int | None) -> str:
    """Where the time of one step of a variant goes.

    On a GPU: kinds of kernels and the time without any, then the kernels by their total time.

    Raises:
        TrainingError: the variant is unknown.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    step, *_ = _make(_variant_of(spec, variant, batch_tokens), variant, device)
    times = []
    for number in range(3):
        _wait(device)
        began = time.perf_counter()
        step(number)
        _wait(device)
        times.append(1e3 * (time.perf_counter() - began))
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch_profile(activities=activities) as recorded:
        step(3)
        _wait(device)
    if device.type != "cuda":
        return str(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return f"{variant}: steps of {', '.join(f'{ms:.0f}' for ms in times)} ms before\n" + (
        kernel_table(kernels)
    )


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch of a kernel, times in microseconds."""

    name: str
    start: float
    end: float


_KINDS: Final = (
    ("attention", ("flash", "fmha", "sdpa", "flex_attention", "attention", "cudnn::fusion")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "gemv", "splitk")),
    ("SwiGLU", ("silu", "sigmoid", "swiglu")),
    ("heads", ("turn_forward", "turn_backward")),
    ("other fused", ("triton",)),
    ("copies", ("memcpy", "memset")),
    ("lists of tensors", ("multi_tensor_apply",)),
)
"""Kinds of kernels, by a part of the name in lower case; the first that fits counts."""


def kernel_table(kernels: Sequence[Kernel], limit: int = 40) -> str:
    """Kernels of a step: first by kind, and the time in which none ran, then one by one."""
    if not kernels:
        return "no kernels\n"
    begin, end = min(k.start for k in kernels), max(k.end for k in kernels)
    reached, idle = begin, 0.0
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for kernel in sorted(kernels, key=lambda k: k.start):
        idle += max(0.0, kernel.start - reached)
        reached = max(reached, kernel.end)
        lower = kernel.name.lower()
        kind = next((name for name, parts in _KINDS if any(p in lower for p in parts)), "other")
        kinds[kind] += kernel.end - kernel.start
        names[kernel.name].append(kernel.end - kernel.start)
    kinds["nothing runs"] = idle
    span = end - begin
    lines = [f"{span / 1e3:.1f} ms from the first kernel to the last"]
    for kind, total in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"{total / 1e3:9.2f} ms {total / span:6.1%}  {kind}")
    lines.append("       ms  share  calls  kernel")
    by_time = sorted(names.items(), key=lambda item: -sum(item[1]))
    for name, times in by_time[:limit]:
        total = sum(times)
        lines.append(f"{total / 1e3:9.2f} {total / span:6.1%} {len(times):6d}  {name[:110]}")
    return "\n".join(lines) + "\n"


def _failed(variant: str, problem: str) -> BenchRow:
    return BenchRow(variant, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, problem=problem)


def _variant_of(spec: Spec, variant: str, batch_tokens: int | None) -> Spec:
    """The spec as a variant changes it, checked.

    Raises:
        TrainingError: an option's value can't be.
        SpecError: its sums don't add up any more.
    """
    _, options = _parse(variant)
    changes: dict[str, Any] = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
    numbers = {"rows": "micro_batch_rows", "chunk": "loss_chunk_tokens", "batch": "batch_tokens"}
    changes |= {field: int(options[key]) for key, field in numbers.items() if key in options}
    changes |= {key: options[key] for key in ("attention", "optimizer", "sdpa") if key in options}
    if "fused" in options:
        changes["fused_projections"] = options["fused"] == "on"
    if "fp8" in options:
        changes["fp8"] = options["fp8"] == "on"
    if "kernels" in options:
        changes["own_kernels"] = options["kernels"] == "own"
    if options.get("mode") == "off":
        changes["compile"] = False
    model = spec.model
    if "layers" in options:
        model = dataclasses.replace(model, num_layers=int(options["layers"]))
    if "width" in options:
        model = _widened(model, int(options["width"]))
    if "head_dim" in options:
        size = int(options["head_dim"])
        heads, spare = divmod(model.num_heads * model.head_dim, size)
        kv_heads, kv_spare = divmod(model.num_kv_heads * model.head_dim, size)
        if spare or kv_spare:
            raise TrainingError(
                f"head_dim is {size}: {model.num_heads} heads and {model.num_kv_heads} key heads "
                f"of {model.head_dim} can't be cut into such heads"
            )
        model = dataclasses.replace(model, head_dim=size, num_heads=heads, num_kv_heads=kv_heads)
    changed = dataclasses.replace(
        spec, model=model, train=dataclasses.replace(spec.train, **changes)
    )
    check_spec(changed)
    return changed


def _widened(model: ModelSpec, width: int) -> ModelSpec:
    """The same shape with another hidden size; query heads share key heads as evenly as before."""
    heads, spare = divmod(width * model.num_heads * model.head_dim, model.hidden_size)
    heads, rest = divmod(heads, model.head_dim)
    shared = model.num_heads // model.num_kv_heads
    kv_heads = next(k for k in range(max(1, heads // shared), heads + 1) if heads % k == 0)
    if spare or rest:
        raise TrainingError(
            f"width is {width}: heads of {model.head_dim} don't fit into it, give a multiple"
        )
    return dataclasses.replace(
        model,
        hidden_size=width,
        intermediate_size=width * model.intermediate_size // model.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
    )


def _parse(variant: str) -> tuple[str, dict[str, str]]:
    name, _, rest = variant.partition(":")
    options = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    unknown = [key for key in options if key not in OPTIONS]
    if name not in ("plain", "nanogpt", "ours") or unknown or (options and name != "ours"):
        raise TrainingError(
            f"{variant!r} is no variant: give plain, nanogpt or ours, and with ours any of "
            f"{', '.join(f'{key}=...' for key in OPTIONS)}"
        )
    return name, options


def _measure(spec: Spec, variant: str, device: torch.device, steps: int) -> BenchRow:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step, flops, update_ms, digest = _make(spec, variant, device)
    times: list[float] = []
    loss = 0.0
    for number in range(steps + 2):
        _wait(device)
        began = time.perf_counter()
        loss = step(number)
        _wait(device)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    peak = peak_flops(device)
    memory = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0
    return BenchRow(
        variant,
        spec.train.batch_tokens / seconds,
        flops(number) / seconds / peak if peak else 0.0,
        1e3 * seconds,
        statistics.median(update_ms[2:]) if update_ms else 0.0,
        1e3 * times[0],
        memory,
        loss,
        digest(),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _make(spec: Spec, variant: str, device: torch.device) -> _Made:
    name, options = _parse(variant)
    stream = RowStream([_random_pack(spec)])
    if name == "ours":
        return _ours(spec, options, stream, device)
    return _whole_model(spec, name, stream, device)


def _random_pack(spec: Spec) -> Pack:
    """Rows for a few steps, in documents of random length."""
    rng = np.random.default_rng(spec.seed)
    length = spec.train.sequence_len
    count = _STEPS * spec.train.batch_tokens // length
    # Low ids are more frequent, so that there is something to learn.
    spread = rng.random((count, length), dtype=np.float32) ** 2
    tokens = (16 + spread * (spec.tokenizer.vocab_size - 16)).astype(np.uint16)
    tokens[rng.random((count, length)) < 1 / min(_MEAN_DOCUMENT, length / 2)] = _END
    tokens[:, -1] = _END
    return Pack(Path(), "bench", tokens, _END, _PAD, tokens.size)


def _ours(spec: Spec, options: dict[str, str], stream: RowStream, device: torch.device) -> _Made:
    mode = options.get("mode")
    if options.get("deterministic") == "on":
        torch.use_deterministic_algorithms(True)
    trainer = Trainer(
        spec,
        stream,
        Path(),
        Path("/nonexistent/bench"),  # nothing is read or written: no run is begun
        World(0, 1, device),
        compile_mode=None if mode == "off" else mode,
    )
    if options.get("muon") == "compiled":
        trainer.optimizer.orthogonalize = torch.compile(orthogonalize)
    update_ms: list[float] = []
    rows = spec.train.batch_tokens // spec.train.sequence_len

    def step(number: int) -> float:
        record = trainer.advance(number % _STEPS, on_update=lambda ms: update_ms.append(ms))
        return record.loss

    def flops(number: int) -> float:
        attended = stream.batch(number % _STEPS * rows, rows).num_attended
        if spec.train.attention == "causal":
            attended = rows * spec.train.sequence_len * (spec.train.sequence_len + 1) // 2
        return _decoder_flops(spec.model_config, spec.train, attended)

    def digest() -> str:
        total = hashlib.sha256()
        for weight in trainer.weights.values():
            total.update(weight.cpu().numpy().tobytes())
        return total.hexdigest()[:16]

    return step, flops, update_ms, digest


def _decoder_flops(config: ModelConfig, train: TrainSpec, attended: int) -> float:
    width = config.num_heads * config.head_dim
    return (
        flops_per_token(config) * train.batch_tokens + 12.0 * config.num_layers * width * attended
    )


def _whole_model(spec: Spec, name: str, stream: RowStream, device: torch.device) -> _Made:
    """The two loops that most people would write, compiled as one function with the loss."""
    train, config = spec.train, spec.model_config
    low = torch.bfloat16 if train.dtype == "bfloat16" else torch.float32
    torch.manual_seed(spec.seed)
    model: nn.Module
    if name == "plain":
        with torch.device("meta"):
            model = Decoder(config)
        model.to_empty(device=device)
        model.load_state_dict(initial_weights(config, train, spec.seed), strict=False)
        model.to(low)
    else:
        model = _Gpt2(config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.lr, betas=train.betas, fused=device.type == "cuda"
    )

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens)
        out: Tensor = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        return out

    compiled = torch.compile(loss_of) if train.compile else loss_of
    rows = train.batch_tokens // train.sequence_len
    micro = train.micro_batch_rows

    def autocast() -> contextlib.AbstractContextManager[Any]:
        if name == "plain" or low == torch.float32:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = torch.autocast(device.type, low)
        return context

    def step(number: int) -> float:
        total = torch.zeros((), device=device)
        for batch in _micro_batches(stream, number, rows, micro, device):
            with autocast():
                loss = compiled(*batch) * micro / rows
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    pairs = rows * train.sequence_len * (train.sequence_len + 1) // 2
    if name == "plain":
        total_flops = _decoder_flops(config, train, pairs)
    else:
        weights = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("places"))
        total_flops = 6.0 * weights * train.batch_tokens
        total_flops += 12.0 * config.num_layers * config.hidden_size * pairs
    return step, lambda _: total_flops, [], lambda: ""


def _micro_batches(
    stream: RowStream, number: int, rows: int, micro: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    start = number % _STEPS * rows
    for first in range(start, start + rows, micro):
        batch = stream.batch(first, micro).to(device)
        yield batch.tokens, batch.targets


class _Gpt2(nn.Module):  # type: ignore[misc]
    """GPT-2 (Radford et al. 2019) without biases and dropout, tied, of the decoder's width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = max(1, d // config.head_dim)
        self.tokens = nn.Embedding(config.vocab_size, d)
        self.places = nn.Embedding(config.max_seq_len, d)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(d, bias=False),
                    "qkv": nn.Linear(d, 3 * d, bias=False),
                    "out": nn.Linear(d, d, bias=False),
                    "norm2": nn.LayerNorm(d, bias=False),
                    "up": nn.Linear(d, 4 * d, bias=False),
                    "down": nn.Linear(4 * d, d, bias=False),
                }
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(d, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of int64 [B, T]."""
        batch, length = tokens.shape
        x = self.tokens(tokens) + self.places.weight[:length]
        for layer in self.layers:
            qkv = layer["qkv"](layer["norm"](x)).view(batch, length, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](seen.transpose(1, 2).reshape(batch, length, -1))
            x = x + layer["down"](functional.gelu(layer["up"](layer["norm2"](x))))
        return functional.linear(self.norm(x), self.tokens.weight)


def table(rows: Sequence[BenchRow]) -> str:
    """A Markdown table; the ratio is to the first row with figures."""
    base = next((row.tokens_per_s for row in rows if row.tokens_per_s), 0.0)
    lines = [
        "| variant | tokens/s | ratio | MFU | step ms | update ms | first s | GiB | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.problem:
            problem = row.problem.replace("|", "/")
            lines.append(f"| {row.variant} | {problem} | | | | | | | |")
            continue
        mfu = f"{row.mfu:.1%}" if row.mfu else ""
        update = f"{row.update_ms:.1f}" if row.update_ms else ""
        lines.append(
            f"| {row.variant} | {row.tokens_per_s:,.0f} | {row.tokens_per_s / base:.2f} | {mfu} "
            f"| {row.step_ms:.1f} | {update} | {row.first_ms / 1e3:.1f} "
            f"| {row.memory_bytes / 2**30:.1f} | {row.loss:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _line(row: BenchRow) -> str:
    if row.problem:
        return f"{row.variant}: {row.problem}"
    return (
        f"{row.variant}: {row.tokens_per_s:,.0f} tokens/s, MFU {row.mfu:.1%}, "
        f"step {row.step_ms:.1f} ms, update {row.update_ms:.1f} ms"
    )
