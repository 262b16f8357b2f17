"""Safetensors files, read without trusting their headers.

Format: https://huggingface.co/docs/safetensors: eight bytes of header length, a JSON header, then
the tensors' bytes. Own reader, because every entry must be checked against the file before
anything is mapped, errors must be albor's, and bfloat16 must come without torch.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from albor_serve.checkpoint.files import map_file, parse_json_object
from albor_serve.errors import CheckpointFormatError
from albor_serve.quant import ByteArray

__all__ = ["SafetensorsFile", "SafetensorsTensor", "open_safetensors"]

_MAX_HEADER_BYTES: Final = 100 << 20  # the reference implementation's limit
_MAX_TENSORS: Final = 1 << 16
_MAX_DIMS: Final = 8
_DTYPE_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """Where one tensor lies."""

    dtype: str
    """As in the file: "BF16", "F16", "F32", ..."""
    shape: tuple[int, ...]
    offset: int
    """From the start of the file, in bytes."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A checked header and read access to the tensors' bytes."""

    path: Path
    tensors: Mapping[str, SafetensorsTensor]
    _map: mmap.mmap

    def data(self, name: str) -> ByteArray:
        """Read-only view of a tensor's bytes, uint8 [num_bytes]. KeyError if there is none."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a file's header; tensor data is mapped, not read.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
        CheckpointFormatError: it is not a sound safetensors file.
    """
    mapped = map_file(path, 8)
    size = len(mapped)
    (header_bytes,) = struct.unpack_from("<Q", mapped, 0)
    if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
        raise _bad(
            path, f"its header claims {header_bytes} bytes of a file of {size} (100 MB at most)"
        )
    header = parse_json_object(mapped[8 : 8 + header_bytes], f"the header of {path}")
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise _bad(path, f"it claims {len(header)} tensors, at most {_MAX_TENSORS} are allowed")
    data_start = 8 + header_bytes
    tensors = {name: _tensor(path, name, entry, data_start, size) for name, entry in header.items()}
    _check_layout(path, tensors, data_start, size)
    return SafetensorsFile(path, tensors, mapped)


def _bad(path: Path, problem: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{path} is not a sound safetensors file: {problem}; download it again"
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor(path: Path, name: str, entry: Any, data_start: int, size: int) -> SafetensorsTensor:
    what = f"tensor {name[:80]!r}"
    if not isinstance(entry, dict):
        raise _bad(path, f"{what} is not described by an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise _bad(path, f"{what} has the unknown type {str(dtype)[:20]!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_count, shape)):
        raise _bad(path, f"{what} has a shape that is not a list of at most {_MAX_DIMS} sizes")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_count, span)):
        raise _bad(path, f"{what} has data_offsets that are not two positions")
    begin, end = span
    if not begin <= end <= size - data_start:
        raise _bad(path, f"{what} lies at {begin} to {end}, outside the file; it may be truncated")
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise _bad(path, f"{what} of {dtype} {shape} does not fill bytes {begin} to {end}")
    return SafetensorsTensor(dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(
    path: Path, tensors: Mapping[str, SafetensorsTensor], data_start: int, size: int
) -> None:
    """The tensors must fill the data exactly: no overlap, no hole, nothing after them."""
    position = data_start
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if tensor.offset != position:
            kind = "overlaps" if tensor.offset < position else "leaves a hole after"
            raise _bad(path, f"tensor {name[:80]!r} {kind} the one before it")
        position += tensor.num_bytes
    if position != size:
        raise _bad(path, f"its tensors end at byte {position} of {size}")
