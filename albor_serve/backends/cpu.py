"""albor's own CPU backend: Q4_0 and Q8_0 models of the Llama family on x86-64 with AVX2 or better.

Decoding and prefill are several times faster than llama.cpp's on the same file; what this backend
can't run, llama.cpp runs (`unsupported` says why).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

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
from albor_serve.backends.thread_governor import ThreadGovernor, is_small_pass
from albor_serve.checkpoint.gguf import GgufCheckpoint, llama3_factors
from albor_serve.config import RopeConfig
from albor_serve.errors import AlborError, BackendError
from albor_serve.kernels.cpu_decode import (
    MATRICES,
    MAX_THREADS,
    CpuDecoder,
    InstructionSet,
    PackedMatrix,
    best_instruction_set,
    load_kernels,
    shape_problem,
)
from albor_serve.quant import FloatArray, quantize_q8_0

__all__ = ["CpuBackend", "rope_tables", "unsupported"]

MAX_BATCH_LEN = 512

_FORMATS = ("Q4_0", "Q8_0")
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def unsupported(checkpoint: GgufCheckpoint) -> str | None:
    """Why this backend can't run the model here, in a few words; None if it can."""
    instruction_set = best_instruction_set()
    if instruction_set is None:
        return "this processor has no AVX2"
    try:
        load_kernels(instruction_set)
        config = checkpoint.config
        problem = shape_problem(config)
        if problem is not None:
            return problem
        for layer in range(config.num_layers):
            for part in MATRICES:
                stored = checkpoint.tensor_format(f"model.layers.{layer}.{part}.weight")
                if stored not in _FORMATS:
                    return f"its matrices are {stored}, not Q4_0 or Q8_0"
        tokens = checkpoint.header.metadata.array_length("tokenizer.ggml.tokens")
        if tokens != config.vocab_size:
            return "its vocabulary and its embedding differ in size"
    except AlborError as error:
        return str(error)
    return None


def rope_tables(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[FloatArray, ...]:
    """Cos and sin of every position's rotations: two float32 arrays [positions, head_dim / 2].

    Plain (Su et al. 2021), linear (Chen et al. 2023) and llama3 scaling.
    """
    frequency = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling == "linear":
        frequency = frequency / rope.factor
    elif rope.scaling == "llama3":
        frequency = frequency / llama3_factors(rope, head_dim)
    elif rope.scaling != "none":
        raise BackendError(f"rope scaling {rope.scaling} is not run by albor's CPU kernels")
    # In float32 like the reference, so that far positions turn alike.
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * frequency.astype(np.float32)
    return np.cos(angles), np.sin(angles)


class _AbortByte:
    """An AbortFlag that the kernels read between pieces of work. Writing a byte is atomic."""

    def __init__(self) -> None:
        self._byte = ctypes.c_uint8(0)
        self.address = ctypes.addressof(self._byte)

    def set(self) -> None:
        """Ask the call in flight to stop."""
        self._byte.value = 1

    def clear(self) -> None:
        """Forget an earlier `set`."""
        self._byte.value = 0

    def is_set(self) -> bool:
        """Whether the next piece of work will stop."""
        return bool(self._byte.value)


class CpuBackend:
    """`Backend` over albor's CPU kernels; see backends/base.py.

    An abort keeps what whole passes of 64 tokens have computed.
    """

    def __init__(
        self,
        checkpoint: GgufCheckpoint,
        num_slots: int,
        max_seq_len: int,
        num_threads: int | None = None,
        progress: Callable[[float], None] | None = None,
        *,
        max_batch_len: int = MAX_BATCH_LEN,
        instruction_set: InstructionSet | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Load a model for which `unsupported` gives None.

        Args:
            checkpoint: an opened GGUF file.
            num_slots: sequences that are held at once, 1 to 64.
            max_seq_len: tokens that each slot can hold.
            num_threads: None takes the physical cores that this process may use, fewer while
                other programs need them, and one for passes so small that waking others does
                not pay.
            progress: called with 0.0 to 1.0 while the weights are read.
            max_batch_len: most tokens in one `extend`.
            instruction_set: None takes the best that this processor has.
            on_close: called once when the backend is closed, to free what belongs to it.

        Raises:
            BackendError: not enough memory or no kernels. ConfigError: a number out of range.
            CheckpointError: the file is damaged.
        """
        check_sizes(
            {
                "num_slots": (num_slots, 64),
                "max_seq_len": (max_seq_len, 1 << 20),
                "num_threads": (num_threads or 1, MAX_THREADS),
                "max_batch_len": (max_batch_len, 1 << 16),
            }
        )
        config = checkpoint.config
        problem = shape_problem(config)
        if problem is not None:
            raise BackendError(f"albor's CPU kernels can't run this model: {problem}")
        kv_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
        check_cache_memory(kv_bytes, num_slots, max_seq_len, native.available_memory_bytes())
        chosen = instruction_set or best_instruction_set()
        if chosen is None:
            raise BackendError("this processor has no AVX2: serve the model through llama.cpp")
        self._num_threads = min(num_threads or native.num_physical_cores(), MAX_THREADS)
        self._governor = ThreadGovernor(self._num_threads) if num_threads is None else None
        cos, sin = rope_tables(config.rope, config.head_dim, max_seq_len)
        self._decoder: CpuDecoder | None = CpuDecoder(
            config,
            cos,
            sin,
            lambda name: _matrix(checkpoint, name),
            checkpoint.read,
            num_slots=num_slots,
            max_seq_len=max_seq_len,
            max_threads=self._num_threads,
            instruction_set=chosen,
            progress=progress,
        )
        self._on_close = on_close
        self._abort = _AbortByte()
        self._lengths = [0] * num_slots
        plural = "s" if self._num_threads != 1 else ""
        self._info = BackendInfo(
            name="cpu",
            device=f"cpu ({chosen}, {self._num_threads} thread{plural})",
            vocab_size=config.vocab_size,
            num_slots=num_slots,
            max_seq_len=max_seq_len,
            max_batch_len=max(max_batch_len, num_slots),
            weight_bytes=self._decoder.weight_bytes,
            kv_bytes_per_token=kv_bytes,
        )
        size = self._info.max_batch_len
        self._tokens, self._slots, self._positions = (np.zeros(size, np.int32) for _ in range(3))
        self._wanted = np.zeros(size, dtype=np.int8)
        self._logits = np.empty((1, config.vocab_size), dtype=np.float32)

    @property
    def info(self) -> BackendInfo:
        """What this backend is."""
        return self._info

    @property
    def abort(self) -> _AbortByte:
        """The flag that stops the call in flight. It stays set until it is cleared."""
        return self._abort

    def extend(self, steps: Sequence[ExtendStep]) -> list[LogitRows]:
        """Append tokens to caches and return logits; see `Backend.extend`."""
        decoder = self._open()
        total = check_steps(self._info, self._lengths, steps)
        if self._abort.is_set():
            raise Aborted
        ends, num_rows = self._lay_out(steps)
        if num_rows > len(self._logits):
            self._logits = np.empty((num_rows, self._info.vocab_size), dtype=np.float32)
        if total:
            if self._governor is not None:
                self._num_threads = self._governor.threads()
                if is_small_pass(self._info.weight_bytes, total):
                    self._num_threads = 1
            done = decoder.extend(
                self._tokens[:total],
                self._slots[:total],
                self._positions[:total],
                self._wanted[:total],
                self._logits,
                self._num_threads,
                self._abort.address,
            )
            begin = 0
            for step, end in zip(steps, ends, strict=True):
                self._lengths[step.slot] += max(0, min(end, done) - begin)
                begin = end
            if done < total:
                raise Aborted
        rows, row = [], 0
        for step in steps:
            rows.append(self._logits[row : row + step.num_rows])
            row += step.num_rows
        return rows

    def rewind(self, slot: int, length: int) -> None:
        """Drop the slot's cache beyond its first `length` tokens (0 empties it)."""
        self._open()
        check_rewind(self._info, slot, length)
        self._lengths[slot] = min(length, self._lengths[slot])

    def fork(self, src: int, dst: int, length: int) -> None:
        """Make `dst` hold the first `length` tokens of `src`; what it held before is dropped."""
        decoder = self._open()
        check_fork(self._info, self._lengths, src, dst, length)
        if src != dst:
            decoder.fork(src, dst, length)
        self._lengths[dst] = length

    def length(self, slot: int) -> int:
        """Tokens that the slot's cache holds."""
        self._open()
        check_slot(self._info, slot)
        return self._lengths[slot]

    def close(self) -> None:
        """Free native memory. Any later call raises BackendError."""
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()
            if self._on_close is not None:
                self._on_close()

    def _open(self) -> CpuDecoder:
        if self._decoder is None:
            raise BackendError("the backend is closed: load the model again")
        return self._decoder

    def _lay_out(self, steps: Sequence[ExtendStep]) -> tuple[list[int], int]:
        """Write the steps into the arrays; returns where each ends, and the rows of logits."""
        begin = num_rows = 0
        ends = []
        for step in steps:
            end = begin + len(step.tokens)
            first = self._lengths[step.slot]
            self._tokens[begin:end] = step.tokens
            self._slots[begin:end] = step.slot
            self._positions[begin:end] = range(first, first + end - begin)
            self._wanted[begin:end] = step.logits_for == "all"
            if step.logits_for == "last" and end > begin:
                self._wanted[end - 1] = 1
            begin = end
            num_rows += step.num_rows
            ends.append(end)
        return ends, num_rows


def _matrix(checkpoint: GgufCheckpoint, name: str) -> PackedMatrix:
    """A matrix as it is stored; an embedding in another format is rounded to Q8_0."""
    stored = checkpoint.quantized(name)
    rows, cols = stored.shape
    if stored.format not in _FORMATS and name in _EMBEDDINGS:
        # llama.cpp's own quantizer keeps these in Q6_K; 8 bits lose nothing that could be seen.
        return PackedMatrix("Q8_0", rows, cols, quantize_q8_0(checkpoint.read(name)))
    return PackedMatrix(stored.format, rows, cols, stored.data)
