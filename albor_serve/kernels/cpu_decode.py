"""A Llama-family decoder for CPUs over Q4_0 and Q8_0 weights: reference and launcher.

The kernel is C++ (cpu_decode.h), compiled at installation once for AVX-512 VNNI and once for
AVX2. What it computes, exactly as `reference_logits` does in numpy:

  - weights stay 4 or 8 bits wide; each input vector of a matrix is rounded to 8 bits with a scale
    for every 32 numbers (as Q8_0), and products are summed in integers within such a group;
  - keys and values are kept as float16, all else is float32;
  - rotary positions turn the first half of a head against the second.

A row of logits depends on its sequence's tokens alone: batching, chunking and the number of
threads change no bit of it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from albor_serve.config import ModelConfig
from albor_serve.errors import BackendError
from albor_serve.quant import ByteArray, FloatArray

__all__ = [
    "MATRICES",
    "MAX_THREADS",
    "CpuDecoder",
    "PackedMatrix",
    "best_instruction_set",
    "load_kernels",
    "reference_logits",
    "shape_problem",
]

InstructionSet = Literal["avx512", "avxvnni", "avx2"]
IntArray = npt.NDArray[np.int32]

MATRICES: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Matrices of a layer, in the kernel's order."""
VECTORS: Final = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS: Final = ("self_attn.q_norm", "self_attn.k_norm")
MAX_THREADS: Final = 64
_VERSION: Final = 1
_BITS: Final = {"Q4_0": 4, "Q8_0": 8}
_NEEDED: Final[dict[InstructionSet, frozenset[str]]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "f16c"}),
    "avxvnni": frozenset({"avx2", "avx_vnni", "f16c", "fma"}),
    "avx2": frozenset({"avx2", "f16c", "fma"}),
}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight matrix as it lies in a GGUF file."""

    format: str
    """"Q4_0" or "Q8_0"."""
    rows: int
    cols: int
    data: ByteArray
    """uint8 [rows, bytes of a row]."""


def shape_problem(config: ModelConfig) -> str | None:
    """Why the kernel can't run a model of this shape, or None."""
    if config.head_dim % 16:
        return f"head_dim is {config.head_dim}, not a multiple of 16"
    group_width = config.num_heads // config.num_kv_heads * config.head_dim
    if group_width % 32:
        return f"the query heads of one key head are {group_width} wide, not a multiple of 32"
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % 32:
            return f"{name} is {getattr(config, name)}, not a multiple of 32"
    if config.rope.scaling == "yarn":
        return "its rotary positions are scaled by yarn"
    return None


def best_instruction_set(cpuinfo: str | None = None) -> InstructionSet | None:
    """The best kernels that this processor runs; None on others than x86-64 Linux with AVX2.

    `cpuinfo` is the text of /proc/cpuinfo; None reads it.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            flags = frozenset(line.partition(":")[2].split())
            return next((name for name, needed in _NEEDED.items() if needed <= flags), None)
    return None


class _Shape(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "max_seq_len",
                "num_slots",
                "max_threads",
            )
        ),
        ("rms_norm_eps", ctypes.c_float),
    )


@functools.cache
def load_kernels(instruction_set: InstructionSet) -> Any:
    """The compiled kernels.

    Raises:
        BackendError: they were not compiled when albor was installed, or can't be loaded.
    """
    found = sorted(Path(__file__).parent.glob(f"_cpu_{instruction_set}*.so"))
    if not found:
        raise BackendError(
            f"albor's CPU kernels for {instruction_set} were not compiled at installation: "
            f"install albor again with a C++ compiler (g++) present"
        )
    try:
        lib = ctypes.CDLL(str(found[0]))
        version = int(lib.albor_cpu_version())
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"albor's CPU kernels {found[0].name} can't be loaded ({error}): install albor again"
        ) from error
    if version != _VERSION:
        raise BackendError(
            f"albor's CPU kernels {found[0].name} are of version {version}, but version "
            f"{_VERSION} is needed: install albor again"
        )
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    lib.albor_cpu_new.restype = pointer
    lib.albor_cpu_new.argtypes = [ctypes.POINTER(_Shape)]
    lib.albor_cpu_free.restype = None
    lib.albor_cpu_free.argtypes = [pointer]
    lib.albor_cpu_set_matrix.argtypes = [pointer, *[integer] * 5, pointer]
    lib.albor_cpu_set_vector.argtypes = [pointer, *[integer] * 3, pointer]
    lib.albor_cpu_extend.argtypes = [pointer, integer, *[pointer] * 5, integer, pointer]
    lib.albor_cpu_fork.restype = None
    lib.albor_cpu_fork.argtypes = [pointer, integer, integer, integer]
    lib.albor_cpu_weight_bytes.restype = ctypes.c_int64
    lib.albor_cpu_weight_bytes.argtypes = [pointer]
    return lib


class CpuDecoder:
    """One model in native memory: weights, caches and threads. Not thread-safe."""

    def __init__(
        self,
        config: ModelConfig,
        cos: FloatArray,
        sin: FloatArray,
        matrix: Callable[[str], PackedMatrix],
        vector: Callable[[str], FloatArray],
        *,
        num_slots: int,
        max_seq_len: int,
        max_threads: int,
        instruction_set: InstructionSet,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Copy the weights into the kernel's layout.

        Args:
            config: the model's shape; `shape_problem` must have found nothing.
            cos, sin: float32 [max_seq_len, head_dim / 2], what each position turns by.
            matrix: gives a matrix by its Hugging Face name.
            vector: gives a norm or bias by its Hugging Face name, float32.
            num_slots: sequences that have a cache.
            max_seq_len: tokens that each cache holds.
            max_threads: threads that may compute, 1 to 64; the workers start now and sleep.
            instruction_set: which kernels.
            progress: called with 0.0 to 1.0.

        Raises:
            BackendError: no kernels, not enough memory, or a matrix in another format.
            What `matrix`, `vector` and `progress` raise.
        """
        self._lib = load_kernels(instruction_set)
        self._vocab_size = config.vocab_size
        shape = _Shape(
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            max_seq_len,
            num_slots,
            min(max_threads, MAX_THREADS),
            config.rms_norm_eps,
        )
        self._model = self._lib.albor_cpu_new(ctypes.byref(shape))
        if not self._model:
            raise BackendError(
                f"there is not enough memory for {num_slots} caches of {max_seq_len} tokens: "
                f"lower --slots or --ctx"
            )
        try:
            self._fill(config, cos, sin, matrix, vector, progress or (lambda _part: None))
        except BaseException:
            self.close()
            raise

    def _fill(
        self,
        config: ModelConfig,
        cos: FloatArray,
        sin: FloatArray,
        matrix: Callable[[str], PackedMatrix],
        vector: Callable[[str], FloatArray],
        progress: Callable[[float], None],
    ) -> None:
        self._set_matrix(-1, 0, matrix("model.embed_tokens.weight"))
        if not config.tie_embeddings:
            self._set_matrix(-1, 1, matrix("lm_head.weight"))
        for which, values in enumerate((vector("model.norm.weight"), cos, sin)):
            self._set_vector(-1, which, values)
        for layer in range(config.num_layers):
            progress(layer / config.num_layers)
            name = f"model.layers.{layer}."
            for which, part in enumerate(MATRICES):
                self._set_matrix(layer, which, matrix(f"{name}{part}.weight"))
            for which, part in enumerate((*VECTORS, *(HEAD_NORMS if config.qk_norm else ()))):
                self._set_vector(layer, which, vector(f"{name}{part}.weight"))
            if config.qkv_bias:
                parts = [vector(f"{name}{part}.bias") for part in MATRICES[:3]]
                self._set_vector(layer, 4, np.concatenate(parts))
        progress(1.0)

    def _set_matrix(self, layer: int, which: int, matrix: PackedMatrix) -> None:
        bits = _BITS.get(matrix.format)
        if bits is None:
            raise BackendError(f"albor's CPU kernels don't read {matrix.format} matrices")
        data = np.ascontiguousarray(matrix.data)
        code = self._lib.albor_cpu_set_matrix(
            self._model, layer, which, bits, matrix.rows, matrix.cols, data.ctypes.data
        )
        self._check_memory(code)

    def _set_vector(self, layer: int, which: int, values: FloatArray) -> None:
        data = np.ascontiguousarray(values, dtype=np.float32)
        code = self._lib.albor_cpu_set_vector(
            self._model, layer, which, data.size, data.ctypes.data
        )
        self._check_memory(code)

    @staticmethod
    def _check_memory(code: int) -> None:
        if code:
            raise BackendError("there is not enough memory for the model's weights: free some")

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads."""
        return int(self._lib.albor_cpu_weight_bytes(self._model))

    def extend(
        self,
        tokens: IntArray,
        slots: IntArray,
        positions: IntArray,
        wanted: npt.NDArray[np.int8],
        logits: FloatArray,
        num_threads: int,
        abort: int,
    ) -> int:
        """Compute tokens, put their keys and values into the caches, write logits.

        Args:
            tokens, slots, positions: [T] contiguous. Tokens of one slot stand together, and
                their positions follow on what its cache holds.
            wanted: [T], 1 where the token's row of logits is asked.
            logits: float32 [number of wanted, vocab_size], written in the order of tokens.
            num_threads: threads for this call.
            abort: address of a byte that stops the call once it is not 0.

        Returns:
            How many tokens are in the caches now: fewer than T only if the call was stopped.
        """
        return int(
            self._lib.albor_cpu_extend(
                self._model,
                tokens.size,
                tokens.ctypes.data,
                slots.ctypes.data,
                positions.ctypes.data,
                wanted.ctypes.data,
                logits.ctypes.data,
                num_threads,
                abort,
            )
        )

    def fork(self, src: int, dst: int, length: int) -> None:
        """Copy the first `length` tokens of slot `src`'s cache to slot `dst`'s."""
        self._lib.albor_cpu_fork(self._model, src, dst, length)

    def close(self) -> None:
        """End the threads and free the memory; closing twice is harmless."""
        model, self._model = self._model, None
        if model:
            self._lib.albor_cpu_free(model)


def _rounded(x: Any) -> Any:
    """Each vector in 8 bits with a scale for every 32 numbers."""
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.rint(groups * inverse)
    return (codes.astype(np.float64) * scale).reshape(x.shape)


def _normed(x: npt.NDArray[np.float64], weight: FloatArray, eps: float) -> Any:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def reference_logits(
    config: ModelConfig,
    cos: FloatArray,
    sin: FloatArray,
    read: Callable[[str], FloatArray],
    tokens: Sequence[int],
    *,
    round_inputs: bool = True,
) -> npt.NDArray[np.float64]:
    """What the kernel computes, in float64: logits [T, V] of every token.

    `read` gives dequantized weights by their Hugging Face names. Without `round_inputs` inputs of
    matrices and caches keep their full precision: the difference is what the rounding costs.
    """
    rounded = _rounded if round_inputs else (lambda x: x)
    eps, dim = config.rms_norm_eps, config.head_dim
    length = len(tokens)
    cos, sin = cos[:length, None, :], sin[:length, None, :]

    def rotated(x: Any) -> Any:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    x = read("model.embed_tokens.weight")[list(tokens)].astype(np.float64)
    causal = np.tril(np.ones((length, length), dtype=bool))
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}."
        q_name, k_name, v_name, o_name, gate_name, up_name, down_name = (
            f"{name}{part}.weight" for part in MATRICES
        )
        inputs = rounded(_normed(x, read(f"{name}{VECTORS[0]}.weight"), eps))
        heads = []
        for part, count in (
            (q_name, config.num_heads),
            (k_name, config.num_kv_heads),
            (v_name, config.num_kv_heads),
        ):
            y = inputs @ read(part).T.astype(np.float64)
            if config.qkv_bias:
                y = y + read(part.replace(".weight", ".bias"))
            heads.append(y.reshape(length, count, dim))
        q, k, v = heads
        if config.qk_norm:
            q = _normed(q, read(f"{name}{HEAD_NORMS[0]}.weight"), eps)
            k = _normed(k, read(f"{name}{HEAD_NORMS[1]}.weight"), eps)
        q, k = rotated(q), rotated(k)
        if round_inputs:
            k, v = (y.astype(np.float16).astype(np.float64) for y in (k, v))
        repeat = config.num_heads // config.num_kv_heads
        k, v = (np.repeat(y, repeat, axis=1) for y in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(dim)
        scores = np.where(causal, scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", probs, v).reshape(length, -1)
        x = x + rounded(mixed) @ read(o_name).T.astype(np.float64)
        inputs = rounded(_normed(x, read(f"{name}{VECTORS[1]}.weight"), eps))
        gate = inputs @ read(gate_name).T.astype(np.float64)
        up = inputs @ read(up_name).T.astype(np.float64)
        hidden = gate / (1 + np.exp(-gate)) * up
        x = x + rounded(hidden) @ read(down_name).T.astype(np.float64)
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    inputs = rounded(_normed(x, read("model.norm.weight"), eps))
    logits: npt.NDArray[np.float64] = inputs @ read(head).T.astype(np.float64)
    return logits
