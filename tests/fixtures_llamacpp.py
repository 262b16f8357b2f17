"""llama.cpp as an oracle, through its low-level binding."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


@contextmanager
def llama_model(path: Path, *, vocab_only: bool = False) -> Iterator[tuple[Any, Any]]:
    """(model, vocab) of a loaded file. Fails the test if llama.cpp does not take it."""
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp does not load {path}"
    try:
        yield model, llama_cpp.llama_model_get_vocab(model)
    finally:
        llama_cpp.llama_model_free(model)


def tokenize(vocab: Any, text: str, *, parse_special: bool = False) -> list[int]:
    """Token ids, nothing added."""
    data = text.encode()
    buffer = (llama_cpp.llama_token * (len(data) + 16))()
    count = llama_cpp.llama_tokenize(
        vocab, data, len(data), buffer, len(buffer), False, parse_special
    )
    assert count >= 0
    return list(buffer[:count])


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits [tokens, vocab] of one sequence from an empty cache, attention and cache in F32."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 512
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    assert context
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        assert llama_cpp.llama_decode(context, batch) == 0
        vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        pointer = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), vocab_size)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
