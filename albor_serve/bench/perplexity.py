"""How well a GGUF model predicts text: what quantization costs, in one number.

Runs in llama.cpp. Text is cut into windows of `ctx` tokens that do not overlap; every token but
a window's first is scored. Both sides of a comparison must use the same texts and `ctx`.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
import numpy.typing as npt

from albor_serve.checkpoint import open_gguf_header
from albor_serve.errors import BackendError, ConfigError

__all__ = ["PerplexityResult", "perplexity"]

_BATCH_LEN: Final = 512


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """Mean negative log-likelihood over all scored tokens, and the figures derived from it."""

    nats_per_token: float
    num_tokens: int
    """Tokens scored."""
    num_bytes: int
    """UTF-8 bytes of all texts, unscored first tokens included."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of a token."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, up to the unscored first tokens."""
        return self.nats_per_token * self.num_tokens / math.log(2) / self.num_bytes


def perplexity(
    gguf_path: Path,
    texts: Sequence[str],
    ctx: int = 1024,
    progress: Callable[[int, int], None] | None = None,
    *,
    max_tokens: int | None = None,
    num_threads: int | None = None,
) -> PerplexityResult:
    """Score texts with a GGUF model on CPU.

    Args:
        gguf_path: the model; its header is checked before llama.cpp opens it.
        texts: each is tokenized alone, as plain text without special tokens.
        ctx: window length in tokens, 2 or more.
        progress: called with (tokens done, tokens in all).
        max_tokens: stop after windows with this many tokens in all.
        num_threads: None takes one for each CPU.

    Raises:
        CheckpointError: the file is no sound GGUF file.
        ConfigError: ctx is below 2 or the texts have no token to score.
        BackendError: llama.cpp failed.
    """
    if ctx < 2:
        raise ConfigError(f"ctx is {ctx}: scoring needs windows of at least 2 tokens")
    open_gguf_header(gguf_path)
    began = time.perf_counter()
    with _loaded(gguf_path, ctx, num_threads or os.cpu_count() or 1) as (vocab, context):
        windows = []
        total = num_bytes = 0
        for text in texts:
            if max_tokens is not None and total >= max_tokens:
                break
            data = text.encode("utf-8", errors="replace")
            tokens = _tokenize(vocab, data)
            num_bytes += len(data)
            total += len(tokens)
            windows += [tokens[start : start + ctx] for start in range(0, len(tokens), ctx)]
        windows = [window for window in windows if len(window) > 1]
        if not windows:
            raise ConfigError("the texts have no token to score: give more text")
        total = sum(len(window) for window in windows)
        vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        loss, scored, done = 0.0, 0, 0
        for window in windows:
            loss += _window_loss(context, window, vocab_size)
            scored += len(window) - 1
            done += len(window)
            if progress is not None:
                progress(done, total)
    return PerplexityResult(loss / scored, scored, num_bytes, time.perf_counter() - began)


@contextmanager
def _loaded(path: Path, ctx: int, num_threads: int) -> Iterator[tuple[Any, Any]]:
    """(vocab, context) of a loaded model, freed at the end."""
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
    if not model:
        raise BackendError(f"llama.cpp cannot load {path}: convert it again or update llama.cpp")
    try:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = ctx
        params.n_batch = params.n_ubatch = min(ctx, _BATCH_LEN)
        params.n_threads = params.n_threads_batch = num_threads
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise BackendError(f"llama.cpp cannot make a context of {ctx} tokens: use less")
        try:
            yield llama_cpp.llama_model_get_vocab(model), context
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)


def _tokenize(vocab: Any, data: bytes) -> list[int]:
    capacity = len(data) + 2
    buffer = (llama_cpp.llama_token * capacity)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, capacity, False, False)
    if count < 0:
        raise BackendError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
    return list(buffer[:count])


def _window_loss(context: Any, window: Sequence[int], vocab_size: int) -> float:
    """Sum of -ln p over a window's tokens but the first."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    loss = 0.0
    for start in range(0, len(window), _BATCH_LEN):
        part = window[start : start + _BATCH_LEN]
        logits = _logits(context, part, start, vocab_size)
        targets = np.asarray(window[start + 1 : start + 1 + len(part)], dtype=np.intp)
        rows = logits[: len(targets)]
        top = rows.max(axis=1)
        log_sum = np.log(np.exp(rows - top[:, None]).sum(axis=1, dtype=np.float64)) + top
        loss += float((log_sum - rows[np.arange(len(targets)), targets]).sum())
    return loss


def _logits(
    context: Any, tokens: Sequence[int], position: int, vocab_size: int
) -> npt.NDArray[np.float32]:
    """Decode tokens at `position` of the sequence; logits [tokens, vocab], valid until the next
    call."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        status = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise BackendError(f"llama.cpp failed to score {len(tokens)} tokens (status {status})")
    pointer = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, shape=(len(tokens), vocab_size))
