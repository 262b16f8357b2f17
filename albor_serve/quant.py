"""Weight formats: how numbers lie in a GGUF file, and how good Q4_0 scales are found.

Every format packs groups of `group_size` consecutive weights of one row (the input dimension)
into `group_bytes` bytes. Q4_0, albor's own, is 32 weights in 18 bytes: an fp16 scale d, then 16
bytes whose low nibbles hold weights 0 to 15 and whose high nibbles hold weights 16 to 31, each as
q = w/d + 8 from 0 to 15. Layouts follow the ggml definitions (ggml-common.h) and are checked bit
for bit against the gguf package.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from albor_serve.errors import CheckpointFormatError, UnsupportedModelError

__all__ = [
    "FORMATS",
    "Q4_GROUP_SIZE",
    "ByteArray",
    "FloatArray",
    "WeightFormat",
    "dequantize",
    "dequantize_q4_0",
    "dequantize_q8_0",
    "num_bytes",
    "quantize_q4_0",
    "quantize_q4_0_calibrated",
    "quantize_q8_0",
]

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

Q4_GROUP_SIZE: Final = 32
"""Consecutive input channels that share one Q4_0 (or Q8_0) scale."""

_CHUNK_WEIGHTS: Final = 1 << 16
"""Weights handled at once: the temporaries then stay in a core's second-level cache."""

_Q4_TARGETS: Final = (
    *(-8.0, -7.4, -6.9, -6.4, -5.9, -5.4, -8.5, -9.0),
    *(7.0, 7.5, 6.5, 6.0, 5.5, 5.0),
)
"""Grid of scale candidates, as the code that the weight of largest magnitude is mapped to. Both
signs, because the codes run from -8 to 7; beyond the range, that weight is clipped."""


_NEGLIGIBLE: Final = np.float32(1e-9)
"""Groups with no weight above this become zeros: the smallest fp16 scale is 6e-8."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one tensor's rows are stored."""

    name: str
    group_size: int
    """Weights of one group; a row must be a whole number of groups."""
    group_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Storage of one weight, scales included."""
        return 8 * self.group_bytes / self.group_size


FORMATS: Final[Mapping[str, WeightFormat]] = MappingProxyType(
    {
        name: WeightFormat(name, group_size, group_bytes)
        for name, group_size, group_bytes in (
            ("F32", 1, 4),
            ("F16", 1, 2),
            ("BF16", 1, 2),
            ("Q4_0", 32, 18),
            ("Q4_1", 32, 20),
            ("Q5_0", 32, 22),
            ("Q5_1", 32, 24),
            ("Q8_0", 32, 34),
            ("Q4_K", 256, 144),
            ("Q5_K", 256, 176),
            ("Q6_K", 256, 210),
        )
    }
)
"""The formats that `dequantize` reads, by their ggml names."""


def num_bytes(format_name: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of `shape` takes in a format.

    Raises UnsupportedModelError for a format not in FORMATS or a row that is not whole groups.
    """
    fmt = _format(format_name)
    if not shape or shape[-1] % fmt.group_size:
        raise UnsupportedModelError(
            f"rows of {shape[-1] if shape else 0} weights cannot be stored as {fmt.name}: the "
            f"length must be a multiple of {fmt.group_size}"
        )
    return math.prod(shape) // fmt.group_size * fmt.group_bytes


def dequantize(data: ByteArray, format_name: str, shape: Sequence[int]) -> FloatArray:
    """Decode a tensor's bytes.

    Args:
        data: uint8, as many bytes as `num_bytes(format_name, shape)`, in any shape; only read.
        format_name: one of FORMATS.
        shape: outermost dimension first; the last is the row length.

    Returns:
        A new float32 array of `shape`.

    Raises:
        UnsupportedModelError: the format is not one of FORMATS.
        CheckpointFormatError: the number of bytes does not fit the shape.
    """
    expected = num_bytes(format_name, shape)
    flat = np.ascontiguousarray(data).reshape(-1)
    if flat.dtype != np.uint8 or flat.size != expected:
        raise CheckpointFormatError(
            f"a {format_name} tensor of shape {tuple(shape)} needs {expected} bytes, not "
            f"{flat.nbytes}: the file is damaged, download it again"
        )
    fmt = _format(format_name)
    decode = _DECODERS[format_name]
    out = np.empty(math.prod(shape), dtype=np.float32)
    groups = flat.reshape(-1, fmt.group_bytes)
    out_groups = out.reshape(-1, fmt.group_size)
    step = max(1, _CHUNK_WEIGHTS // fmt.group_size)
    for start in range(0, len(groups), step):
        out_groups[start : start + step] = decode(groups[start : start + step])
    return out.reshape(tuple(shape))


def dequantize_q4_0(packed: ByteArray) -> FloatArray:
    """Decode Q4_0 rows: uint8 [rows, row_bytes] to float32 [rows, row_bytes / 18 * 32]."""
    rows, row_bytes = packed.shape
    return dequantize(packed, "Q4_0", (rows, row_bytes // 18 * 32))


def dequantize_q8_0(packed: ByteArray) -> FloatArray:
    """Decode Q8_0 rows: uint8 [rows, row_bytes] to float32 [rows, row_bytes / 34 * 32]."""
    rows, row_bytes = packed.shape
    return dequantize(packed, "Q8_0", (rows, row_bytes // 34 * 32))


def quantize_q4_0(
    weights: npt.NDArray[np.floating],
    importance: FloatArray | None = None,
    *,
    num_threads: int | None = None,
) -> ByteArray:
    """Round a matrix to Q4_0 with the scale of each group chosen for least squared error.

    For each group, a grid of scales of both signs is tried; the best one is refined by least
    squares against its own codes and compared, after rounding to fp16, with the common choice
    (the largest weight becomes -8). So no group is ever worse than with that choice.

    Args:
        weights: [rows, cols] of any float type, cols a multiple of 32; only read.
        importance: [cols], how much an error in each input channel matters (the mean square of
            that channel's activations); None weighs all channels alike.
        num_threads: threads to use; None takes one for each CPU, 8 at most.

    Returns:
        uint8 [rows, cols / 32 * 18].

    Raises:
        UnsupportedModelError: cols is not a multiple of 32.
        CheckpointFormatError: a weight or an importance is not finite, or is too large for fp16.
    """
    rows, cols = _check_matrix(weights, "Q4_0")
    num_groups = cols // Q4_GROUP_SIZE
    emphasis: FloatArray | None = None
    if importance is not None:
        emphasis = _check_importance(importance, cols).reshape(num_groups, Q4_GROUP_SIZE)
    out = np.empty((rows, num_groups, 18), dtype=np.uint8)

    def work(start: int, stop: int) -> None:
        chunk = _groups(weights, start, stop)
        scale, codes = _search_q4_0(chunk, emphasis)
        _store_q4_0(scale, codes, out[start:stop])

    _in_threads(work, _row_chunks(rows, cols), num_threads)
    return out.reshape(rows, num_groups * 18)


def quantize_q4_0_calibrated(
    weights: npt.NDArray[np.floating],
    moments: npt.NDArray[np.floating],
    *,
    damping: float = 0.01,
    num_threads: int | None = None,
) -> ByteArray:
    """Round a matrix to Q4_0 so that its outputs change least on calibration data.

    GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one after the other, and
    the error of each is made up for by the columns still to come, as far as their inputs are
    correlated. A group's scale is searched when its turn comes, its channels weighted by what
    the later ones cannot make up for.

    Args:
        weights: as for `quantize_q4_0`.
        moments: [cols, cols], mean of x xᵀ over calibration inputs x; symmetric.
        damping: share of the mean of the diagonal that is added to it. Covers channels that
            calibration hardly excited and keeps the corrections small.
        num_threads: as for `quantize_q4_0`.

    Returns:
        uint8 [rows, cols / 32 * 18].

    Raises what `quantize_q4_0` raises.
    """
    rows, cols = _check_matrix(weights, "Q4_0")
    factor = _feedback_factor(moments, cols, damping)
    residual = 1 / np.diag(factor) ** 2
    emphasis = (residual / residual.mean()).astype(np.float32).reshape(-1, 1, Q4_GROUP_SIZE)
    factor = factor.astype(np.float32)
    out = np.empty((rows, cols // Q4_GROUP_SIZE, 18), dtype=np.uint8)

    def work(start: int, stop: int) -> None:
        left = _groups(weights, start, stop).reshape(stop - start, cols)  # a copy, ours to change
        for group in range(cols // Q4_GROUP_SIZE):
            first, after = group * Q4_GROUP_SIZE, (group + 1) * Q4_GROUP_SIZE
            current = np.ascontiguousarray(left[:, first:after])
            scale = _search_q4_0(current[:, None, :], emphasis[group])[0][:, 0]
            inverse = _inverse(scale)
            codes = np.empty_like(current)
            errors = np.empty_like(current)
            for i in range(Q4_GROUP_SIZE):
                row = factor[first + i]
                codes[:, i] = np.rint(current[:, i] * inverse).clip(-8, 7)
                errors[:, i] = (current[:, i] - codes[:, i] * scale) / row[first + i]
                current[:, i + 1 :] -= errors[:, i, None] * row[first + i + 1 : after]
            left[:, after:] -= errors @ factor[first:after, after:]
            _store_q4_0(scale, codes, out[start:stop, group])

    step = max(256, _CHUNK_WEIGHTS // cols)
    chunks = ((start, min(rows, start + step)) for start in range(0, rows, step))
    _in_threads(work, chunks, num_threads)
    return out.reshape(rows, -1)


def quantize_q8_0(
    weights: npt.NDArray[np.floating], *, num_threads: int | None = None
) -> ByteArray:
    """Round a matrix to Q8_0: 32 weights share an fp16 scale, the largest one becomes ±127.

    Takes and raises what `quantize_q4_0` does. Returns uint8 [rows, cols / 32 * 34].
    """
    rows, cols = _check_matrix(weights, "Q8_0")
    out = np.empty((rows, cols // Q4_GROUP_SIZE, 34), dtype=np.uint8)

    def work(start: int, stop: int) -> None:
        chunk = _groups(weights, start, stop)
        scale = _to_fp16(np.abs(chunk).max(axis=-1) / np.float32(127))
        codes = np.rint(chunk * _inverse(scale)[..., None]).clip(-127, 127)
        out[start:stop, :, :2] = scale.astype("<f2")[..., None].view(np.uint8)
        out[start:stop, :, 2:] = codes.astype(np.int8).view(np.uint8)

    _in_threads(work, _row_chunks(rows, cols), num_threads)
    return out.reshape(rows, -1)


def _format(name: str) -> WeightFormat:
    try:
        return FORMATS[name]
    except KeyError:
        raise UnsupportedModelError(
            f"tensors stored as {name} cannot be decoded: use a file in one of {', '.join(FORMATS)}"
        ) from None


def _check_matrix(weights: npt.NDArray[np.floating], format_name: str) -> tuple[int, int]:
    if weights.ndim != 2 or not np.issubdtype(weights.dtype, np.floating):
        raise UnsupportedModelError(
            f"only matrices of floats can be stored as {format_name}, not {weights.dtype} of shape "
            f"{weights.shape}"
        )
    num_bytes(format_name, weights.shape)
    rows, cols = weights.shape
    return rows, cols


def _check_importance(importance: FloatArray, cols: int) -> FloatArray:
    if importance.shape != (cols,):
        raise UnsupportedModelError(
            f"importance has shape {importance.shape}: it needs one value for each of the "
            f"{cols} input channels"
        )
    values = importance.astype(np.float32)
    mean = float(values.mean())
    if not math.isfinite(mean) or mean <= 0 or values.min() < 0:
        raise CheckpointFormatError(
            "importance must be finite, non-negative and not all zero: calibrate again"
        )
    # A channel that calibration never excited must still be rounded sensibly.
    return values / np.float32(mean) + np.float32(1e-3)


def _feedback_factor(
    moments: npt.NDArray[np.floating], cols: int, damping: float
) -> npt.NDArray[np.float64]:
    """Upper triangular U with UᵀU = (moments + damping)⁻¹: row i says how the error of column i
    is passed on to later columns."""
    if moments.shape != (cols, cols):
        raise UnsupportedModelError(
            f"second moments have shape {moments.shape}: a matrix with {cols} input channels "
            f"needs ({cols}, {cols})"
        )
    damped = moments.astype(np.float64)
    mean = float(np.diag(damped).mean())
    if not np.isfinite(damped).all() or mean <= 0:
        raise CheckpointFormatError(
            "second moments must be finite and not all zero: calibrate again"
        )
    damped[np.diag_indices(cols)] += damping * mean
    try:
        return np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError as error:
        raise CheckpointFormatError(
            "second moments are not positive definite: calibrate on more text"
        ) from error


def _store_q4_0(scale: FloatArray, codes: FloatArray, out: ByteArray) -> None:
    """Pack scales [...] and codes -8..7 [..., 32] into `out` [..., 18]."""
    out[..., :2] = scale.astype("<f2")[..., None].view(np.uint8)
    nibbles = (codes + np.float32(8)).astype(np.uint8)
    out[..., 2:] = nibbles[..., :16] | (nibbles[..., 16:] << np.uint8(4))


def _row_chunks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_WEIGHTS // cols)
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def _in_threads(
    work: Callable[[int, int], None], chunks: Iterator[tuple[int, int]], num_threads: int | None
) -> None:
    threads = num_threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter lock
        for _ in pool.map(lambda chunk: work(*chunk), chunks):
            pass


def _groups(weights: npt.NDArray[np.floating], start: int, stop: int) -> FloatArray:
    """Rows start to stop as float32 [rows, groups, 32]."""
    chunk = weights[start:stop].astype(np.float32).reshape(stop - start, -1, Q4_GROUP_SIZE)
    largest = float(np.abs(chunk).max())
    if not largest <= 65504.0:  # also true of NaN
        raise CheckpointFormatError(
            f"a weight is {largest}: weights must be finite and at most 65504 to be quantized; the "
            f"checkpoint is damaged or its training diverged"
        )
    return chunk


def _to_fp16(scale: FloatArray) -> FloatArray:
    return scale.astype(np.float16).astype(np.float32)


def _inverse(scale: FloatArray) -> FloatArray:
    """1/scale, and 0 where the scale is 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _search_q4_0(groups: FloatArray, emphasis: FloatArray | None) -> tuple[FloatArray, FloatArray]:
    """Best scale [rows, G] (exact in fp16) and codes -8..7 [rows, G, 32] for groups [rows, G, 32].

    With codes q fixed, the error Σ h(w - dq)² is least for d = Σhwq / Σhq² and is then
    Σhw² - (Σhwq)² / Σhq², so candidates are ranked by that last fraction alone.
    """
    position = np.abs(groups).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(groups, position, axis=-1)[..., 0]
    # Far below the smallest fp16 scale every weight rounds to 0, and 1/largest may overflow.
    inverse = _inverse(np.where(np.abs(largest) < _NEGLIGIBLE, np.float32(0), largest))
    weighted = groups if emphasis is None else groups * emphasis

    best_gain = np.full(largest.shape, -1, dtype=np.float32)
    best_scale = np.zeros_like(largest)
    codes = np.empty_like(groups)
    for target in _Q4_TARGETS:
        _round_codes(groups, inverse * np.float32(target), codes)
        cross, square = _moments(weighted, codes, emphasis)
        scale = cross * _inverse(square)
        gain = cross * scale
        better = gain > best_gain
        best_gain[better] = gain[better]
        best_scale[better] = scale[better]

    reference = _to_fp16(largest / np.float32(-8))
    chosen = _to_fp16(best_scale)
    for _ in range(2):
        _round_codes(groups, _inverse(chosen), codes)
        cross, square = _moments(weighted, codes, emphasis)
        refined = _to_fp16(cross * _inverse(square))
        chosen = _better_scale(groups, emphasis, chosen, refined)
    chosen = _better_scale(groups, emphasis, chosen, reference)
    # -0.0 would be a scale too, but two spellings of zero make files differ for no reason.
    chosen = np.where(chosen == 0, np.float32(0), chosen)
    _round_codes(groups, _inverse(chosen), codes)
    return chosen, codes


def _round_codes(groups: FloatArray, inverse_scale: FloatArray, out: FloatArray) -> None:
    """Write the nearest codes -8..7 into `out`."""
    np.multiply(groups, inverse_scale[..., None], out=out)
    np.rint(out, out=out)
    np.clip(out, -8, 7, out=out)


def _moments(
    weighted: FloatArray, codes: FloatArray, emphasis: FloatArray | None
) -> tuple[FloatArray, FloatArray]:
    """Σhwq and Σhq² of each group."""
    cross = np.einsum("rgi,rgi->rg", weighted, codes)
    if emphasis is None:
        return cross, np.einsum("rgi,rgi->rg", codes, codes)
    return cross, np.einsum("rgi,rgi,gi->rg", codes, codes, emphasis)


def _better_scale(
    groups: FloatArray, emphasis: FloatArray | None, first: FloatArray, second: FloatArray
) -> FloatArray:
    """Of two fp16 scales, the one with less error in each group; the first where they tie."""
    errors = []
    codes = np.empty_like(groups)
    for scale in (first, second):
        _round_codes(groups, _inverse(scale), codes)
        codes *= scale[..., None]
        codes -= groups
        error, square = _moments(codes, codes, emphasis)
        errors.append(error if emphasis is None else square)
    return np.where(errors[1] < errors[0], second, first)


def _fp16_column(groups: ByteArray, start: int) -> FloatArray:
    """The fp16 at byte `start` of each group, as float32 [n, 1]."""
    column = np.ascontiguousarray(groups[:, start : start + 2])
    return column.view("<f2").astype(np.float32)


def _nibbles(packed: ByteArray) -> ByteArray:
    """[n, 16] bytes to [n, 32] codes 0..15, all low halves first."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _decode_f32(groups: ByteArray) -> FloatArray:
    return np.ascontiguousarray(groups).view("<f4").astype(np.float32)


def _decode_f16(groups: ByteArray) -> FloatArray:
    return np.ascontiguousarray(groups).view("<f2").astype(np.float32)


def _decode_bf16(groups: ByteArray) -> FloatArray:
    bits = np.ascontiguousarray(groups).view("<u2").astype(np.uint32)
    return (bits << np.uint32(16)).view(np.float32)


def _decode_q4_0(groups: ByteArray) -> FloatArray:
    codes = _nibbles(groups[:, 2:]).astype(np.float32) - np.float32(8)
    return _fp16_column(groups, 0) * codes


def _decode_q4_1(groups: ByteArray) -> FloatArray:
    codes = _nibbles(groups[:, 4:]).astype(np.float32)
    return _fp16_column(groups, 0) * codes + _fp16_column(groups, 2)


def _fifth_bits(packed: ByteArray) -> ByteArray:
    """[n, 4] bytes to [n, 32] with the value 16 where the bit is set."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _decode_q5_0(groups: ByteArray) -> FloatArray:
    codes = (_nibbles(groups[:, 6:]) | _fifth_bits(groups[:, 2:6])).astype(np.float32)
    return _fp16_column(groups, 0) * (codes - np.float32(16))


def _decode_q5_1(groups: ByteArray) -> FloatArray:
    codes = (_nibbles(groups[:, 8:]) | _fifth_bits(groups[:, 4:8])).astype(np.float32)
    return _fp16_column(groups, 0) * codes + _fp16_column(groups, 2)


def _decode_q8_0(groups: ByteArray) -> FloatArray:
    codes = np.ascontiguousarray(groups[:, 2:]).view(np.int8).astype(np.float32)
    return _fp16_column(groups, 0) * codes


def _k_scales(packed: ByteArray) -> tuple[FloatArray, FloatArray]:
    """Six-bit scales and minima of Q4_K and Q5_K: [n, 12] bytes to two arrays [n, 8].

    The first four of each lie in the low six bits of bytes 0..3 and 4..7; the last four have
    their low four bits in bytes 8..11 and their high two in the top of bytes 0..7.
    """
    low, high, mixed = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (mixed & 0x0F) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([high & 63, (mixed >> 4) | ((high >> 6) << 4)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_nibbles(packed: ByteArray) -> ByteArray:
    """[n, 128] bytes to [n, 8, 32]: each 32 bytes hold one sub-group low and the next high."""
    parts = packed.reshape(-1, 4, 32)
    return np.stack([parts & 0x0F, parts >> 4], axis=2).reshape(-1, 8, 32)


def _k_affine(groups: ByteArray, codes: ByteArray) -> FloatArray:
    scales, minima = _k_scales(groups[:, 4:16])
    scale = (_fp16_column(groups, 0) * scales)[..., None]
    minimum = (_fp16_column(groups, 2) * minima)[..., None]
    return (scale * codes.astype(np.float32) - minimum).reshape(-1, 256)


def _decode_q4_k(groups: ByteArray) -> FloatArray:
    return _k_affine(groups, _k_nibbles(groups[:, 16:]))


def _decode_q5_k(groups: ByteArray) -> FloatArray:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (groups[:, None, 16:48] >> shifts) & np.uint8(1)
    return _k_affine(groups, _k_nibbles(groups[:, 48:]) | (fifth << np.uint8(4)))


def _decode_q6_k(groups: ByteArray) -> FloatArray:
    low = groups[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 0x0F, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (groups[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
    scales = np.ascontiguousarray(groups[:, 192:208]).view(np.int8).astype(np.float32)
    scale = (_fp16_column(groups, 208) * scales)[..., None]
    return (scale * codes.reshape(-1, 16, 16)).reshape(-1, 256)


_DECODERS: Final[Mapping[str, Callable[[ByteArray], FloatArray]]] = MappingProxyType(
    {
        "F32": _decode_f32,
        "F16": _decode_f16,
        "BF16": _decode_bf16,
        "Q4_0": _decode_q4_0,
        "Q4_1": _decode_q4_1,
        "Q5_0": _decode_q5_0,
        "Q5_1": _decode_q5_1,
        "Q8_0": _decode_q8_0,
        "Q4_K": _decode_q4_k,
        "Q5_K": _decode_q5_k,
        "Q6_K": _decode_q6_k,
    }
)
