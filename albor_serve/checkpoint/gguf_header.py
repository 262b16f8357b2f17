"""GGUF headers, read without trusting a byte of them.

Native readers of GGUF have had memory-safety holes, and the gguf package can hang on a file of a
few dozen bytes; so every file passes through here first. Every count, length and offset is
checked against the bytes that are really there, and the work is bounded by the size of the
header, so that a damaged or hostile file costs one clear error and little time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from albor_serve.checkpoint.files import map_file
from albor_serve.errors import CheckpointFormatError, UnsupportedModelError
from albor_serve.quant import ByteArray

__all__ = ["GgufHeader", "GgufMetadata", "GgufTensor", "MetadataValue", "open_gguf_header"]

MetadataValue = int | float | bool | str | list[str] | list[int] | list[float] | list[bool]

_MIN_BYTES: Final = 24
_MAX_HEADER_BYTES: Final = 256 << 20
_MAX_ENTRIES: Final = 1 << 16
_MAX_TENSORS: Final = 1 << 16
_MAX_KEY_BYTES: Final = (1 << 16) - 1  # the specification's limit
_MAX_NAME_BYTES: Final = 63  # ggml keeps names in 64 bytes, with a zero at the end
_MAX_DIMS: Final = 4
_MAX_STRING_BYTES: Final = 16 << 20
_MAX_ARRAY_LENGTH: Final = 1 << 24
_MAX_ALIGNMENT: Final = 1 << 16

_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
_SCALARS: Final[Mapping[int, tuple[str, str]]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    _BOOL: ("bool", "B"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_TYPE_NAMES: Final[Mapping[int, str]] = {
    **{number: name for number, (name, _) in _SCALARS.items()},
    _STRING: "string",
    _ARRAY: "array",
}

_TENSOR_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""ggml type number: name, weights of a group, bytes of a group."""

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies."""

    name: str
    type: str
    """ggml name of the format, such as "Q4_0"."""
    shape: tuple[int, ...]
    """Outermost dimension first (the reverse of the file's order); the last is the row length."""
    offset: int
    """From the start of the file, in bytes."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One metadata value, still in the file."""

    type: int
    element_type: int
    """Of an array; equal to `type` otherwise."""
    offset: int
    length: int
    """Elements of an array, bytes of a string, 1 otherwise."""
    end: int


@dataclass(slots=True)
class GgufMetadata(Mapping[str, MetadataValue]):
    """The file's key-value pairs. Values are decoded when they are asked for.

    Strings are decoded as UTF-8 with U+FFFD for damage; `raw_strings` gives their bytes.
    """

    _entries: dict[str, _Entry]
    _map: mmap.mmap
    _decoded: dict[str, MetadataValue] = field(default_factory=dict)

    def __getitem__(self, key: str) -> MetadataValue:
        if key not in self._decoded:
            self._decoded[key] = self._decode(self._entries[key])
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def type_name(self, key: str) -> str:
        """Type in the file: "uint32", "string", ..., "array[string]". KeyError if absent."""
        entry = self._entries[key]
        if entry.type == _ARRAY:
            return f"array[{_TYPE_NAMES[entry.element_type]}]"
        return _TYPE_NAMES[entry.type]

    def array_length(self, key: str) -> int | None:
        """Elements of an array without decoding it; None if absent or not an array."""
        entry = self._entries.get(key)
        return entry.length if entry is not None and entry.type == _ARRAY else None

    def raw_strings(self, key: str) -> list[bytes]:
        """Bytes of each element of an array of strings.

        Raises CheckpointFormatError if the key is absent or holds something else.
        """
        entry = self._entries.get(key)
        if entry is None or entry.type != _ARRAY or entry.element_type != _STRING:
            raise self._wrong(key, "an array of strings")
        return self._string_array(entry)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number. Raises CheckpointFormatError if it is absent without a default, or is
        not a whole number."""
        if key not in self._entries and default is not None:
            return default
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises CheckpointFormatError like `integer`."""
        if key not in self._entries and default is not None:
            return default
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        if not math.isfinite(value):
            raise self._wrong(key, "a finite number")
        return float(value)

    def string(self, key: str, default: str | None = None) -> str:
        """A string. Raises CheckpointFormatError like `integer`."""
        if key not in self._entries and default is not None:
            return default
        value = self.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def _wrong(self, key: str, rule: str) -> CheckpointFormatError:
        found = self.type_name(key) if key in self._entries else "absent"
        return CheckpointFormatError(
            f"GGUF metadata {key!r} is {found}: it must be {rule}; convert the model again"
        )

    def _decode(self, entry: _Entry) -> MetadataValue:
        if entry.type == _STRING:
            data = self._map[entry.offset : entry.offset + entry.length]
            return data.decode("utf-8", errors="replace")
        if entry.element_type == _STRING:
            return [item.decode("utf-8", errors="replace") for item in self._string_array(entry)]
        code = _SCALARS[entry.element_type][1]
        values = struct.unpack_from(f"<{entry.length}{code}", self._map, entry.offset)
        if entry.element_type == _BOOL:
            values = tuple(value != 0 for value in values)
        return list(values) if entry.type == _ARRAY else values[0]

    def _string_array(self, entry: _Entry) -> list[bytes]:
        data = self._map[entry.offset : entry.end]
        unpack = _U64.unpack_from
        items = []
        position = 0
        for _ in range(entry.length):
            start = position + 8
            position = start + unpack(data, position)[0]
            items.append(data[start:position])
        return items


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header and read access to the tensors' bytes."""

    path: Path
    version: int
    alignment: int
    metadata: GgufMetadata
    tensors: Mapping[str, GgufTensor]
    data_offset: int
    """Where tensor data begins, in bytes from the start of the file."""
    num_bytes: int
    """Size of the file."""
    _map: mmap.mmap

    @property
    def architecture(self) -> str:
        """general.architecture, such as "qwen2". Raises CheckpointFormatError if absent."""
        return self.metadata.string("general.architecture")

    @property
    def num_splits(self) -> int:
        """Files that the model is spread over."""
        return max(1, self.metadata.integer("split.count", 1))

    def data(self, name: str) -> ByteArray:
        """Read-only view of a tensor's bytes, uint8 [num_bytes]. KeyError if there is none."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)


def open_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file of any architecture.

    The file is mapped, not read: tensor data is not touched. Safe on damaged and hostile files.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
        CheckpointFormatError: it is not a sound GGUF file.
        UnsupportedModelError: its version, byte order or a tensor type is not known.
    """
    return _Parser(path, map_file(path, _MIN_BYTES)).header()


class _Parser:
    """Walks one header. `_position` only grows; every read is checked against `_end`."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path = path
        self._map = mapped
        self._size = len(mapped)
        self._end = min(self._size, _MAX_HEADER_BYTES)
        self._position = 0

    def header(self) -> GgufHeader:
        version, num_tensors, num_entries = self._preamble()
        metadata = GgufMetadata(self._entries(num_entries), self._map)
        alignment = self._alignment(metadata)
        tensors = self._tensors(num_tensors, alignment)
        data_offset = -(-self._position // alignment) * alignment
        placed = self._place(tensors, data_offset)
        return GgufHeader(
            self._path, version, alignment, metadata, placed, data_offset, self._size, self._map
        )

    def _bad(self, problem: str) -> CheckpointFormatError:
        return CheckpointFormatError(
            f"{self._path} is not a sound GGUF file: {problem}; download or convert it again"
        )

    def _take(self, num_bytes: int, what: str) -> int:
        """Claim the next bytes; their offset."""
        start = self._position
        if num_bytes > self._end - start:
            if self._end < self._size:
                raise self._bad(f"its header is larger than {_MAX_HEADER_BYTES >> 20} MB")
            raise self._bad(f"it ends inside {what} (byte {start} of {self._size})")
        self._position = start + num_bytes
        return start

    def _u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self._map, self._take(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self._map, self._take(8, what))[0]
        return value

    def _name(self, limit: int, what: str) -> str:
        length = self._u64(what)
        if not 0 < length <= limit:
            raise self._bad(f"{what} has {length} bytes, 1 to {limit} are allowed")
        start = self._take(length, what)
        data = self._map[start : start + length]
        try:
            name = data.decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"{what} at byte {start} is not UTF-8") from None
        if not name.isprintable():
            raise self._bad(f"{what} at byte {start} has control characters")
        return name

    def _preamble(self) -> tuple[int, int, int]:
        magic = self._map[self._take(4, "the preamble") : 4]
        if magic != b"GGUF":
            raise CheckpointFormatError(
                f"{self._path} begins with {magic!r}, a GGUF file begins with b'GGUF': give a "
                f".gguf file or a checkpoint folder"
            )
        version = self._u32("the preamble")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedModelError(
                f"{self._path} is a big-endian GGUF file: only little-endian ones are read"
            )
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"{self._path} is GGUF version {version}: versions 2 and 3 are read; convert the "
                f"model again"
            )
        num_tensors = self._u64("the preamble")
        num_entries = self._u64("the preamble")
        if num_tensors > _MAX_TENSORS:
            raise self._bad(f"it claims {num_tensors} tensors, at most {_MAX_TENSORS} are allowed")
        if num_entries > _MAX_ENTRIES:
            raise self._bad(f"it claims {num_entries} keys, at most {_MAX_ENTRIES} are allowed")
        return version, num_tensors, num_entries

    def _entries(self, count: int) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for _ in range(count):
            key = self._name(_MAX_KEY_BYTES, "a metadata key")
            if key in entries:
                raise self._bad(f"metadata key {key[:80]!r} occurs twice")
            entries[key] = self._entry(f"metadata {key[:80]!r}")
        return entries

    def _entry(self, what: str) -> _Entry:
        kind = self._u32(what)
        if kind == _STRING:
            length = self._u64(what)
            if length > _MAX_STRING_BYTES:
                raise self._bad(f"{what} claims {length} bytes, at most {_MAX_STRING_BYTES} may be")
            start = self._take(length, what)
            return _Entry(kind, kind, start, length, self._position)
        if kind == _ARRAY:
            return self._array(what)
        start = self._take(self._scalar_size(kind, what), what)
        if kind == _BOOL:
            self._check_bools(start, 1, what)
        return _Entry(kind, kind, start, 1, self._position)

    def _array(self, what: str) -> _Entry:
        kind = self._u32(what)
        length = self._u64(what)
        smallest = 8 if kind == _STRING else self._scalar_size(kind, what)
        if length > _MAX_ARRAY_LENGTH or length * smallest > self._end - self._position:
            raise self._bad(f"{what} claims {length} elements, more than the file can hold")
        start = self._position
        if kind == _STRING:
            self._skip_strings(length, what)
        else:
            self._take(length * smallest, what)
            if kind == _BOOL:
                self._check_bools(start, length, what)
        return _Entry(_ARRAY, kind, start, length, self._position)

    def _skip_strings(self, count: int, what: str) -> None:
        # A vocabulary has some 300,000 strings, so this loop is kept as small as Python allows.
        # A length beyond the end makes the next unpack, or the last check, fail.
        unpack, data, position = _U64.unpack_from, self._map, self._position
        try:
            for _ in range(count):
                position += 8 + unpack(data, position)[0]
        except (struct.error, OverflowError):
            position = self._size + 1
        if position > self._end:
            raise self._bad(f"a string of {what} runs past the end of the header")
        self._position = position

    def _scalar_size(self, kind: int, what: str) -> int:
        if kind not in _SCALARS:
            rule = "arrays of arrays are not allowed" if kind == _ARRAY else "there is no such type"
            raise self._bad(f"{what} has type {kind}, {rule}")
        return struct.calcsize(f"<{_SCALARS[kind][1]}")

    def _check_bools(self, start: int, length: int, what: str) -> None:
        if length and np.frombuffer(self._map, np.uint8, length, start).max() > 1:
            raise self._bad(f"{what} holds a truth value that is neither 0 nor 1")

    def _alignment(self, metadata: GgufMetadata) -> int:
        alignment = metadata.integer("general.alignment", 32)
        if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._bad(
                f"general.alignment is {alignment}, it must be a power of two up to "
                f"{_MAX_ALIGNMENT}"
            )
        return alignment

    def _tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for _ in range(count):
            name = self._name(_MAX_NAME_BYTES, "a tensor name")
            if name in tensors:
                raise self._bad(f"tensor {name!r} occurs twice")
            tensors[name] = self._tensor(name, alignment)
        return tensors

    def _tensor(self, name: str, alignment: int) -> GgufTensor:
        what = f"tensor {name!r}"
        num_dims = self._u32(what)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._bad(f"{what} has {num_dims} dimensions, 1 to {_MAX_DIMS} are allowed")
        shape = tuple(self._u64(what) for _ in range(num_dims))[::-1]
        number = self._u32(what)
        offset = self._u64(what)
        if number not in _TENSOR_TYPES:
            raise UnsupportedModelError(
                f"{self._path}: {what} has type number {number}, which is not known: use a file "
                f"in a common format such as Q4_0, Q4_K_M, Q8_0 or F16"
            )
        type_name, group_size, group_bytes = _TENSOR_TYPES[number]
        count = math.prod(shape)
        if count == 0 or shape[-1] % group_size:
            raise self._bad(
                f"{what} has shape {shape}, which {type_name} (groups of {group_size}) cannot store"
            )
        if offset % alignment:
            raise self._bad(f"{what} lies at {offset}, not at a multiple of {alignment}")
        num_bytes = count // group_size * group_bytes
        if num_bytes > self._size or offset > self._size:
            raise self._bad(f"{what} needs {num_bytes} bytes at {offset}, beyond the file's end")
        return GgufTensor(name, type_name, shape, offset, num_bytes)

    def _place(self, tensors: dict[str, GgufTensor], data_offset: int) -> dict[str, GgufTensor]:
        """Turn offsets within the data into offsets within the file, and check the layout."""
        end, previous = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._bad(f"tensors {previous!r} and {tensor.name!r} overlap")
            end, previous = tensor.offset + tensor.num_bytes, tensor.name
            if data_offset + end > self._size:
                raise self._bad(
                    f"it has {self._size} bytes but tensor {previous!r} ends at "
                    f"{data_offset + end}: it is truncated"
                )
        return {
            name: GgufTensor(name, t.type, t.shape, data_offset + t.offset, t.num_bytes)
            for name, t in tensors.items()
        }
