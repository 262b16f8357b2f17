"""The CPU backend: llama.cpp through llama-cpp-python's low-level functions.

One context holds all slots; each slot is one llama.cpp sequence. Only the C functions are used:
the package's own high-level class copies logits, cuts long tokens and drives one sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from albor_serve.backends import llamacpp_native as native
from albor_serve.backends.base import Aborted, BackendInfo, ExtendStep, LogitRows
from albor_serve.backends.checks import (
    check_cache_memory,
    check_fork,
    check_rewind,
    check_sizes,
    check_slot,
    check_steps,
)
from albor_serve.backends.llamacpp_tokenizer import LlamaCppTokenizer
from albor_serve.backends.thread_governor import ThreadGovernor
from albor_serve.errors import (
    BackendError,
    CheckpointError,
    CheckpointFormatError,
    ConfigError,
    UnsupportedModelError,
)

__all__ = ["LlamaCppBackend", "LlamaCppModelInfo", "LlamaCppVocabulary"]

MAX_BATCH_LEN = 512
MICRO_BATCH_LEN = 64
"""Prefill of 512 tokens takes 3 % longer than with 256, and an abort loses a quarter."""

_ABORTED = 2
_NO_ROOM = 1


@dataclass(frozen=True, slots=True)
class LlamaCppModelInfo:
    """What llama.cpp says of a model file."""

    architecture: str
    """general.architecture, such as "qwen3"."""
    name: str
    """general.name, or "" where the file has none."""
    description: str
    """llama.cpp's own line, such as "qwen3 0.03B Q4_0"."""
    num_parameters: int
    size_bytes: int
    """Bytes of all tensors."""
    vocab_size: int
    train_seq_len: int
    """Longest sequence the model was made for, in tokens."""
    num_layers: int
    hidden_size: int
    can_rewind: bool
    """False for recurrent and hybrid models, whose cache can only be emptied."""


class LlamaCppBackend:
    """`Backend` over one llama.cpp context. Make one with `load`; see backends/base.py."""

    def __init__(
        self,
        lib: Any,
        model: Any,
        context: Any,
        *,
        num_slots: int,
        max_seq_len: int,
        max_batch_len: int,
        num_threads: int,
        kv_bytes_per_element: int,
        governor: ThreadGovernor | None = None,
    ) -> None:
        """Take ownership of `model` and `context`; `load` is the public way."""
        self._lib = lib
        self._model = model
        self._context = context
        self._memory = lib.llama_get_memory(context)
        self._lengths = [0] * num_slots
        self._num_threads = num_threads
        self._governor = governor
        self._abort = native.NativeAbortFlag()
        self._abort.install(lib, context)
        vocab = lib.llama_model_get_vocab(model)
        self._tokenizer = LlamaCppTokenizer(vocab)
        self._model_info = _model_info(lib, model, vocab)
        self._vocab_size = self._model_info.vocab_size
        self._info = BackendInfo(
            name="llamacpp",
            device=f"cpu ({num_threads} thread{'s' if num_threads != 1 else ''})",
            vocab_size=self._vocab_size,
            num_slots=num_slots,
            max_seq_len=max_seq_len,
            max_batch_len=max_batch_len,
            weight_bytes=self._model_info.size_bytes,
            kv_bytes_per_token=_kv_elements_per_token(lib, model) * kv_bytes_per_element,
        )
        self._make_batch(max_batch_len, num_slots)

    @classmethod
    def load(
        cls,
        path: str | Path,
        num_slots: int,
        max_seq_len: int,
        num_threads: int | None = None,
        progress: Callable[[float], None] | None = None,
        use_mmap: bool = True,
        *,
        kv_type: Literal["f16", "f32"] = "f16",
        max_batch_len: int = MAX_BATCH_LEN,
        micro_batch_len: int = MICRO_BATCH_LEN,
        flash_attention: bool = False,
        unified_kv: bool = False,
        adapters: Sequence[tuple[Path, float]] = (),
    ) -> LlamaCppBackend:
        """Load a GGUF file.

        Args:
            path: the file (the first part of a split model).
            num_slots: sequences that are held at once, 1 to 64.
            max_seq_len: tokens that each slot can hold.
            num_threads: None takes the physical cores that this process may use, fewer while
                other programs need them.
            progress: called with 0.0 to 1.0 while the weights are read, on this thread. What it
                raises ends the load and is raised from here.
            use_mmap: map the file instead of reading it.
            kv_type: element type of the KV cache.
            max_batch_len: most tokens in one `extend`.
            micro_batch_len: tokens computed at once. An abort loses the unfinished ones, so a
                smaller number keeps more of an aborted prefill.
            flash_attention: use llama.cpp's fused attention. On CPUs it makes prefill a little
                faster, but decoding after 1,900 tokens 3.5 times slower, and it rounds keys and
                values to F16 whatever `kv_type` says.
            unified_kv: one attention buffer for all slots instead of one for each. A slot then
                pays for what the others hold: decoding beside three full slots takes 3 times as
                long.
            adapters: LoRA adapters, as checked GGUF files, and their scales.

        Raises:
            CheckpointError: no such file, or llama.cpp cannot read it. UnsupportedModelError: it
            has no decoder or no vocabulary. BackendError: not enough memory, or a library built
            for another CPU. ConfigError: a number out of range.
        """
        _check_sizes(num_slots, max_seq_len, num_threads, max_batch_len, micro_batch_len)
        path = Path(path)
        lib = native.load_library()
        threads = num_threads or native.num_physical_cores()
        model = _load_model(lib, path, progress, use_mmap)
        context = None
        try:
            _check_model(lib, model, path)
            params = lib.llama_context_default_params()
            # llama.cpp gives each sequence n_ctx / n_seq_max cells, in whole 256s.
            params.n_ctx = num_slots * (-(-max_seq_len // 256) * 256)
            params.n_batch = max_batch_len
            params.n_ubatch = min(micro_batch_len, max_batch_len)
            params.n_seq_max = num_slots
            params.n_outputs_max = max_batch_len
            params.n_threads = threads
            params.n_threads_batch = threads
            params.flash_attn_type = (
                lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
                if flash_attention
                else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
            ggml_types = {
                "f16": (lib.GGML_TYPE_F16, 2),
                "f32": (lib.GGML_TYPE_F32, 4),
            }
            params.type_k = params.type_v = ggml_types[kv_type][0]
            bytes_per_token = _kv_elements_per_token(lib, model) * ggml_types[kv_type][1]
            check_cache_memory(
                bytes_per_token, num_slots, max_seq_len, native.available_memory_bytes()
            )
            params.offload_kqv = False
            params.op_offload = False
            params.no_perf = True
            # A sliding-window cache that forgets old tokens could not be rewound.
            params.swa_full = True
            params.kv_unified = unified_kv
            native.last_log_errors()
            context = lib.llama_init_from_model(model, params)
            if not context:
                raise BackendError(
                    f"llama.cpp could not make a context of {num_slots} slots with {max_seq_len} "
                    f"tokens each{_reason()}: lower --slots or --ctx"
                )
            _add_adapters(lib, model, context, adapters)
            return cls(
                lib,
                model,
                context,
                num_slots=num_slots,
                max_seq_len=max_seq_len,
                max_batch_len=max_batch_len,
                num_threads=threads,
                governor=ThreadGovernor(threads) if num_threads is None else None,
                kv_bytes_per_element=ggml_types[kv_type][1],
            )
        except BaseException:
            if context:
                lib.llama_free(context)
            lib.llama_model_free(model)
            raise

    @property
    def info(self) -> BackendInfo:
        """What this backend is."""
        return self._info

    @property
    def abort(self) -> native.NativeAbortFlag:
        """The flag that stops the call in flight. It stays set until it is cleared."""
        return self._abort

    @property
    def tokenizer(self) -> LlamaCppTokenizer:
        """The file's own tokenizer; it lives as long as this backend is open."""
        return self._tokenizer

    @property
    def model_info(self) -> LlamaCppModelInfo:
        """What llama.cpp says of the model file."""
        return self._model_info

    def extend(self, steps: Sequence[ExtendStep]) -> list[LogitRows]:
        """Append tokens to caches and return logits; see `Backend.extend`.

        The arrays are views of llama.cpp's own buffer.
        """
        self._check_open()
        total = check_steps(self._info, self._lengths, steps)
        if self._abort.is_set():
            raise Aborted
        if total == 0:
            return [self._no_rows() for _ in steps]
        # llama.cpp computes sequences together only where their numbers follow one another, so
        # they go in slot order.
        order = sorted(range(len(steps)), key=lambda i: steps[i].slot)
        starts = self._fill_batch([steps[i] for i in order])
        self._fit_threads()
        native.last_log_errors()
        code = int(self._lib.llama_decode(self._context, self._batch))
        if code:
            self._read_lengths(steps)
            self._raise_decode_error(code, total)
        for step in steps:
            self._lengths[step.slot] += len(step.tokens)
        num_rows = starts[-1]
        rows = self._no_rows()
        if num_rows:
            pointer = self._lib.llama_get_logits(self._context)
            if not pointer:
                raise BackendError(
                    f"llama.cpp returned no logits for {num_rows} rows{_reason()}: restart"
                )
            rows = np.ctypeslib.as_array(pointer, shape=(num_rows, self._vocab_size))
        result = [rows] * len(steps)
        for position, i in enumerate(order):
            result[i] = rows[starts[position] : starts[position + 1]]
        return result

    def _fit_threads(self) -> None:
        """Use only the cores that other programs leave free, if they are not fixed."""
        if self._governor is None:
            return
        threads = self._governor.threads()
        if threads != self._num_threads:
            self._num_threads = threads
            self._lib.llama_set_n_threads(self._context, threads, threads)

    def rewind(self, slot: int, length: int) -> None:
        """Drop the slot's cache beyond its first `length` tokens (0 empties it).

        A recurrent model's cache cannot be cut in the middle: it is emptied then, which
        `length(slot)` shows.
        """
        self._check_open()
        check_rewind(self._info, slot, length)
        if length >= self._lengths[slot]:
            return
        if not self._lib.llama_memory_seq_rm(self._memory, slot, length, -1):
            self._lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
            length = 0
        self._lengths[slot] = length

    def fork(self, src: int, dst: int, length: int) -> None:
        """Make `dst` hold the first `length` tokens of `src`; what it held before is dropped.

        The copy is made by the next `extend`. A recurrent model's prefix cannot be shared in
        part: `length(dst)` is 0 then.
        """
        self._check_open()
        check_fork(self._info, self._lengths, src, dst, length)
        if src == dst:
            self.rewind(dst, length)
            return
        self.rewind(dst, 0)
        if length == 0:
            return
        # Between sequences with caches of their own llama.cpp copies whole ones only.
        self._lib.llama_memory_seq_cp(self._memory, src, dst, -1, -1)
        self._lengths[dst] = self._lengths[src]
        self.rewind(dst, length)

    def length(self, slot: int) -> int:
        """Tokens that the slot's cache holds."""
        self._check_open()
        check_slot(self._info, slot)
        return self._lengths[slot]

    def close(self) -> None:
        """Free the context and the model. Any later call raises BackendError."""
        self._tokenizer.close()
        context, model = self._context, self._model
        self._context = self._memory = self._model = None
        if context:
            self._lib.llama_free(context)
        if model:
            self._lib.llama_model_free(model)

    def _check_open(self) -> None:
        if not self._context:
            raise BackendError("the backend is closed: load the model again")

    def _make_batch(self, size: int, num_slots: int) -> None:
        """Lay out the arrays of one llama_batch, to be refilled for every call."""
        lib = self._lib
        self._slot_ids = np.arange(num_slots, dtype=np.int32)
        self._slot_pointers = np.arange(num_slots, dtype=np.uintp) * self._slot_ids.itemsize
        self._slot_pointers += self._slot_ids.ctypes.data
        self._tokens = np.zeros(size, dtype=np.int32)
        self._positions = np.zeros(size, dtype=np.int32)
        self._num_slots_of_token = np.ones(size, dtype=np.int32)
        self._slots_of_token = np.zeros(size, dtype=np.uintp)
        self._wanted = np.zeros(size, dtype=np.int8)
        self._batch = lib.llama_batch()
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._num_slots_of_token),
            ("seq_id", self._slots_of_token),
            ("logits", self._wanted),
        ):
            kind = dict(lib.llama_batch._fields_)[name]
            setattr(self._batch, name, ctypes.cast(array.ctypes.data, kind))

    def _fill_batch(self, steps: Sequence[ExtendStep]) -> list[int]:
        """Write the steps into the batch; returns each step's first row of logits, and the end."""
        begin = row = 0
        starts = [0]
        for step in steps:
            count = len(step.tokens)
            end = begin + count
            self._tokens[begin:end] = step.tokens
            first = self._lengths[step.slot]
            self._positions[begin:end] = np.arange(first, first + count)
            self._slots_of_token[begin:end] = self._slot_pointers[step.slot]
            self._wanted[begin:end] = step.logits_for == "all"
            if step.logits_for == "last" and count:
                self._wanted[end - 1] = 1
            begin = end
            row += step.num_rows
            starts.append(row)
        self._batch.n_tokens = begin
        return starts

    def _read_lengths(self, steps: Sequence[ExtendStep]) -> None:
        """Take the lengths from llama.cpp: a failed call may have kept some of its tokens.

        A recurrent state may have been half updated, and nothing can take that back.
        """
        for step in steps:
            if not self._model_info.can_rewind:
                self._lib.llama_memory_seq_rm(self._memory, step.slot, -1, -1)
            last = int(self._lib.llama_memory_seq_pos_max(self._memory, step.slot))
            self._lengths[step.slot] = last + 1

    def _raise_decode_error(self, code: int, total: int) -> None:
        if code == _ABORTED:
            native.last_log_errors()
            raise Aborted
        if code == _NO_ROOM:
            raise BackendError(
                f"llama.cpp found no room in its KV cache for {total} tokens{_reason()}: use "
                f"fewer slots at once or a smaller context"
            )
        raise BackendError(
            f"llama.cpp could not compute {total} tokens (code {code}){_reason()}: restart, and "
            f"check the free memory"
        )

    def _no_rows(self) -> LogitRows:
        return np.empty((0, self._vocab_size), dtype=np.float32)


class LlamaCppVocabulary:
    """The vocabulary of a GGUF file without its weights, for backends that have none."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            CheckpointError: no such file, or llama.cpp cannot read it. UnsupportedModelError: it
            has no vocabulary.
        """
        self._lib = native.load_library()
        self._model = _load_model(self._lib, path, None, use_mmap=True, vocab_only=True)
        vocab = self._lib.llama_model_get_vocab(self._model)
        if self._lib.llama_vocab_type(vocab) == self._lib.LLAMA_VOCAB_TYPE_NONE:
            self._lib.llama_model_free(self._model)
            raise UnsupportedModelError(f"{path} has no vocabulary: give a model for text")
        self._tokenizer = LlamaCppTokenizer(vocab)

    @property
    def tokenizer(self) -> LlamaCppTokenizer:
        """The file's own tokenizer; it lives until `close`."""
        return self._tokenizer

    def close(self) -> None:
        """Free the vocabulary; closing twice is harmless."""
        self._tokenizer.close()
        model, self._model = self._model, None
        if model:
            self._lib.llama_model_free(model)


def _check_sizes(
    num_slots: int,
    max_seq_len: int,
    num_threads: int | None,
    max_batch_len: int,
    micro_batch_len: int,
) -> None:
    check_sizes(
        {
            "num_slots": (num_slots, 64),
            "max_seq_len": (max_seq_len, 1 << 20),
            "num_threads": (num_threads or 1, 512),
            "max_batch_len": (max_batch_len, 1 << 16),
            "micro_batch_len": (micro_batch_len, 1 << 16),
        }
    )
    if max_batch_len < num_slots:
        raise ConfigError(
            f"max_batch_len is {max_batch_len}: it must be at least the {num_slots} slots, so "
            f"that each can take one token"
        )


def _load_model(
    lib: Any,
    path: Path,
    progress: Callable[[float], None] | None,
    use_mmap: bool,
    vocab_only: bool = False,
) -> Any:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the model file {path}: {error.strerror or error}"
        ) from error
    if magic != b"GGUF":
        raise CheckpointFormatError(
            f"{path} is not a GGUF file (it begins with {magic!r}): give a .gguf file"
        )
    failure: list[BaseException] = []

    def report(fraction: float, _data: object) -> bool:
        try:
            if progress is not None:
                progress(fraction)
        except BaseException as error:  # noqa: BLE001 - raised again once C has returned
            failure.append(error)
            return False
        return True

    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocab_only
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if use_mmap else lib.LLAMA_LOAD_MODE_NONE
    params.progress_callback = lib.llama_progress_callback(report)
    native.last_log_errors()
    model = lib.llama_model_load_from_file(bytes(path), params)
    if failure:
        if model:
            lib.llama_model_free(model)
        raise failure[0]
    if not model:
        raise CheckpointError(
            f"llama.cpp cannot load {path}{_reason()}: check that the file is whole and that "
            f"its architecture is one that this llama-cpp-python knows"
        )
    return model


def _add_adapters(
    lib: Any, model: Any, context: Any, adapters: Sequence[tuple[Path, float]]
) -> None:
    """Read the adapters, which live as long as the model, and use them in the context."""
    if not adapters:
        return
    native.last_log_errors()
    handles = []
    for path, _ in adapters:
        handle = lib.llama_adapter_lora_init(model, str(path).encode())
        if not handle:
            raise CheckpointFormatError(
                f"llama.cpp cannot use the adapter{_reason()}: check that it was made for this "
                f"model"
            )
        handles.append(handle)
    num = len(handles)
    scales = (ctypes.c_float * num)(*(scale for _, scale in adapters))
    pointers = (ctypes.POINTER(ctypes.c_void_p) * num)(*handles)
    if lib.llama_set_adapters_lora(context, pointers, num, scales):
        raise BackendError(f"llama.cpp could not apply the adapters{_reason()}")


def _check_model(lib: Any, model: Any, path: Path) -> None:
    vocab = lib.llama_model_get_vocab(model)
    if lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
        raise UnsupportedModelError(f"{path} has no vocabulary: give a model for text")
    if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
        raise UnsupportedModelError(
            f"{path} is not a decoder-only model: give one that completes text"
        )


def _metadata(lib: Any, model: Any, key: str) -> str | None:
    size = 256
    buffer = ctypes.create_string_buffer(size)
    count = lib.llama_model_meta_val_str(model, key.encode(), buffer, size)
    return None if count < 0 else buffer.value.decode("utf-8", "replace")


def _model_info(lib: Any, model: Any, vocab: Any) -> LlamaCppModelInfo:
    buffer = ctypes.create_string_buffer(256)
    lib.llama_model_desc(model, buffer, 256)
    return LlamaCppModelInfo(
        architecture=_metadata(lib, model, "general.architecture") or "",
        name=_metadata(lib, model, "general.name") or "",
        description=buffer.value.decode("utf-8", "replace"),
        num_parameters=int(lib.llama_model_n_params(model)),
        size_bytes=int(lib.llama_model_size(model)),
        vocab_size=int(lib.llama_vocab_n_tokens(vocab)),
        train_seq_len=int(lib.llama_model_n_ctx_train(model)),
        num_layers=int(lib.llama_model_n_layer(model)),
        hidden_size=int(lib.llama_model_n_embd(model)),
        can_rewind=not (lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model)),
    )


def _kv_elements_per_token(lib: Any, model: Any) -> int:
    """Numbers in the keys and values of one token, over all layers."""
    arch = _metadata(lib, model, "general.architecture") or ""
    heads = max(1, int(lib.llama_model_n_head(model)))
    default = int(lib.llama_model_n_embd(model)) // heads
    width = 0
    for part in ("key", "value"):
        text = _metadata(lib, model, f"{arch}.attention.{part}_length")
        width += int(text) if text and text.isdigit() else default
    return int(lib.llama_model_n_layer(model)) * int(lib.llama_model_n_head_kv(model)) * width


def _reason() -> str:
    """Llama.cpp's last complaints in brackets, or nothing."""
    text = native.last_log_errors()
    return f" ({text})" if text else ""
