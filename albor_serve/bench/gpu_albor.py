"""Albor's own rows of albor-bench gpu."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from albor_serve.backends.base import ExtendStep
from albor_serve.backends.cuda import LONG_CONTEXT, CudaBackend
from albor_serve.bench.gpu import GpuJob
from albor_serve.bench.gpu_child import model_config
from albor_serve.bench.gpu_rows import GpuRow
from albor_serve.bench.gpu_timing import Put, attempt, device_us, host_us
from albor_serve.config import DevicePlan, ModelConfig, SamplingParams
from albor_serve.errors import ConfigError
from albor_serve.kernels.decoder import GpuDecoder, plan_for
from albor_serve.kernels.synthetic import RandomModel
from albor_serve.kernels.weights import DecodeWeights

__all__ = ["measure_albor", "measure_backend"]

ENGINE: Final = "albor"
_STEPS: Final = 8
"""Tokens of one graph of steps that feed themselves."""
_MOST_ROWS: Final = 8
_NEW: Final = 32
_FIM_PROMPT: Final = 512
_FIM_CACHED: Final = 480


def measure_albor(job: GpuJob, put: Put) -> None:
    """Every row: the kernels alone, then the backend as the engine calls it."""
    started = time.perf_counter()
    with _open(job, model_config(job)) as backend:
        seconds = time.perf_counter() - started
        note = "weights packed, kernels compiled or found in Triton's cache"
        put(GpuRow(ENGINE, "start", us=1e6 * seconds, note=note))
        _measure_kernels(job, backend.decode_weights, put)
        measure_backend(job, backend, put)


def _measure_kernels(job: GpuJob, weights: DecodeWeights, put: Put) -> None:
    """CUDA graphs, by the GPU's clock."""
    pdl = torch.cuda.get_device_capability() >= (9, 0)
    config, room = weights.config, max(job.contexts) + 64
    decoders = [GpuDecoder(weights, room) for _ in range(max(job.batches, default=1))]
    kv_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim

    def parts(context: int) -> int:
        return 16 if context > LONG_CONTEXT else 8

    def place(context: int) -> None:
        for decoder in decoders:
            decoder.position.fill_(context)

    def token(context: int) -> GpuRow:
        plan = plan_for(weights, pdl=pdl, num_parts=parts(context))
        place(context)
        graph = decoders[0].capture(plan, feedback=True, num_steps=_STEPS)
        us = device_us(graph.replay, job.repeats, lambda: place(context)) / _STEPS
        read = weights.bytes_per_token + context * kv_bytes
        return GpuRow(ENGINE, "token, graph", context, us=us, read_bytes=read)

    def verify(context: int, rows: int) -> GpuRow:
        """Rows of one sequence in one step, or in several of eight."""
        size = min(rows, _MOST_ROWS)
        plan = plan_for(weights, num_tokens=size, pdl=pdl, num_parts=parts(context))
        place(context)
        graph = decoders[0].capture(plan, feedback=False, store_logits=True)
        count = -(-rows // size)

        def run() -> None:
            for _ in range(count):
                graph.replay()

        us = device_us(run, job.repeats, lambda: place(context))
        read = weights.bytes_per_token + (context + rows) * kv_bytes
        note = f"{count} steps of {size}" if count > 1 else ""
        return GpuRow(
            ENGINE, "verify, graph", context, rows=rows, us=us, read_bytes=read, note=note
        )

    def batch(context: int, size: int) -> GpuRow:
        plan = plan_for(weights, pdl=pdl, num_parts=parts(context))
        place(context)
        graphs = [
            decoder.capture(plan, feedback=False, store_logits=True) for decoder in decoders[:size]
        ]

        def run() -> None:
            for graph in graphs:
                graph.replay()

        us = device_us(run, job.repeats, lambda: place(context))
        read = weights.bytes_per_token + size * context * kv_bytes
        return GpuRow(
            ENGINE, "step of all slots, graphs", context, size, us=us, read_bytes=read,
            note="slots one after the other",
        )  # fmt: skip

    for context in job.contexts:
        _try(put, partial(token, context), "token, graph", context)
    middle = _middle(job)
    for rows in job.rows:
        _try(put, partial(verify, middle, rows), "verify, graph", middle, rows=rows)
    for size in job.batches:
        _try(put, partial(batch, middle, size), "step of all slots, graphs", middle, size)


def _try(
    put: Put, row: Callable[[], GpuRow], what: str, context: int, batch: int = 1, rows: int = 1
) -> None:
    attempt(put, row, GpuRow(ENGINE, what, context, batch, rows))


def _middle(job: GpuJob) -> int:
    """The context of rows that are measured at one context alone: 512 where it is asked for."""
    return 512 if 512 in job.contexts else job.contexts[0]


@contextlib.contextmanager
def _open(job: GpuJob, config: ModelConfig) -> Iterator[CudaBackend]:
    slots = max(job.batches, default=1)
    if job.model is None:
        model = RandomModel(config)
        backend = CudaBackend(config, model.q4_rows, model.read, slots, config.max_seq_len)
    else:
        from albor_serve.checkpoint.gguf import open_gguf_checkpoint

        checkpoint = open_gguf_checkpoint(Path(job.model))
        backend = CudaBackend.from_gguf(checkpoint, slots, config.max_seq_len)
    try:
        yield backend
    finally:
        backend.close()


def measure_backend(job: GpuJob, backend: CudaBackend, put: Put) -> None:
    """What the engine sees, by the host's clock, tokens and logits copied to it."""
    info = backend.info
    rng = np.random.default_rng(0)
    most = max((*job.contexts, *job.prompts, _FIM_PROMPT))
    tokens = [int(t) for t in rng.integers(0, info.vocab_size, most + 64)]

    def fill(length: int, num_slots: int = 1) -> None:
        """Make slots hold `length` tokens exactly."""
        for slot in range(num_slots):
            backend.rewind(slot, length)
            while (have := backend.length(slot)) < length:
                part = tokens[have : min(length, have + info.max_batch_len)]
                backend.extend([ExtendStep(slot, part, "none")])

    def decode(count: int) -> list[int]:
        plan = DevicePlan(SamplingParams(temperature=0.0), count)
        new: list[int] = backend.decode(0, tokens[0], plan, lambda _token: True)
        if len(new) != count:
            raise ConfigError(f"{len(new)} tokens came instead of {count}")
        return new

    def token(context: int) -> GpuRow:
        fill(context)
        us = host_us(lambda: decode(_NEW), job.repeats, lambda: fill(context)) / _NEW
        read = info.weight_bytes + context * info.kv_bytes_per_token
        return GpuRow(ENGINE, "decoded token, host sees it", context, us=us, read_bytes=read)

    def rows_of(context: int, rows: int) -> GpuRow:
        fill(context)
        step = ExtendStep(0, tokens[:rows], "all")
        us = host_us(lambda: backend.extend([step]), job.repeats, lambda: fill(context))
        return GpuRow(ENGINE, "extend, all logits to the host", context, rows=rows, us=us)

    def batch(context: int, size: int) -> GpuRow:
        fill(context, size)
        steps = [ExtendStep(slot, tokens[:1]) for slot in range(size)]
        us = host_us(lambda: backend.extend(steps), job.repeats, lambda: fill(context, size))
        return GpuRow(ENGINE, "extend, slots together", context, size, us=us)

    def prompt(length: int) -> GpuRow:
        def run() -> None:
            for at in range(0, length, info.max_batch_len):
                part = tokens[at : min(length, at + info.max_batch_len)]
                last = at + len(part) == length
                rows = backend.extend([ExtendStep(0, part, "last" if last else "none")])
                if last:
                    int(rows[0][-1].argmax())

        us = host_us(run, max(3, job.repeats // 3), lambda: fill(0))
        return GpuRow(ENGINE, "prompt to its first token", rows=length, us=us)

    def suggestion() -> GpuRow:
        def run() -> None:
            part = tokens[_FIM_CACHED : _FIM_PROMPT - 1]
            backend.extend([ExtendStep(0, part, "none")])
            decode(_NEW)

        us = host_us(run, job.repeats, lambda: fill(_FIM_CACHED))
        new = _FIM_PROMPT - _FIM_CACHED
        note = f"prompt of {_FIM_PROMPT}, {_NEW} tokens decoded"
        return GpuRow(ENGINE, "FIM suggestion", _FIM_CACHED, rows=new, us=us, note=note)

    _try(put, suggestion, "FIM suggestion", _FIM_CACHED, rows=_FIM_PROMPT - _FIM_CACHED)
    for context in job.contexts:
        _try(put, partial(token, context), "decoded token, host sees it", context)
    for length in job.prompts:
        _try(put, partial(prompt, length), "prompt to its first token", 0, rows=length)
    middle = _middle(job)
    what = "extend, all logits to the host"
    for rows in job.rows:
        _try(put, partial(rows_of, middle, rows), what, middle, rows=rows)
    for size in job.batches:
        _try(put, partial(batch, middle, size), "extend, slots together", middle, size)
