"""checkpoint/gguf_header.py: sound files are read, everything else gives one clear error."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albor_serve.checkpoint import open_gguf_header
from albor_serve.checkpoint.gguf_header import GgufHeader
from albor_serve.errors import (
    AlborError,
    CheckpointError,
    CheckpointFormatError,
    UnsupportedModelError,
)
from tests.fixtures_checkpoint import gguf_bytes, gguf_entry, gguf_string, gguf_tensor

_F32_TENSOR = gguf_tensor("w", (8, 2), 0, 0)
_DATA = np.arange(16, dtype="<f4").tobytes()


def _open(folder: Path, data: bytes) -> GgufHeader:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return open_gguf_header(path)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file written by the gguf package with every kind of value."""
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_uint8("a.uint8", 200)
    writer.add_int8("a.int8", -3)
    writer.add_uint16("a.uint16", 60000)
    writer.add_int16("a.int16", -30000)
    writer.add_uint32("a.uint32", 4_000_000_000)
    writer.add_int32("a.int32", -5)
    writer.add_float32("a.float32", 0.5)
    writer.add_uint64("a.uint64", 1 << 63)
    writer.add_int64("a.int64", -(1 << 62))
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "héllo\n")
    writer.add_array("b.strings", ["x", "ab", "Ġé"])
    writer.add_array("b.ints", [1, -2, 3])
    writer.add_array("b.floats", [0.5, 1.5])
    writer.add_array("b.bools", [True, False])
    writer.add_tensor("blk.0.w", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("blk.0.h", np.arange(5, dtype=np.float16))
    q4 = np.zeros((2, 36), dtype=np.uint8)
    writer.add_tensor("blk.0.q", q4, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_reads_what_the_gguf_package_wrote(sample: bytes, tmp_path: Path) -> None:
    header = _open(tmp_path, sample)
    meta = header.metadata
    assert header.architecture == "mamba"  # not one of ours: the header opens all the same
    assert [meta[f"a.{kind}"] for kind in ("uint8", "int8", "uint16", "int16")] == [
        *(200, -3, 60000, -30000)
    ]
    assert (meta["a.uint32"], meta["a.int32"], meta["a.uint64"]) == (4_000_000_000, -5, 1 << 63)
    assert (meta["a.float32"], meta["a.float64"], meta["a.bool"]) == (0.5, 0.1, True)
    assert meta["a.string"] == "héllo\n"
    assert meta["b.strings"] == ["x", "ab", "Ġé"]
    assert meta.raw_strings("b.strings")[2] == "Ġé".encode()
    assert (meta["b.ints"], meta["b.floats"], meta["b.bools"]) == (
        *([1, -2, 3], [0.5, 1.5], [True, False]),
    )
    assert meta.type_name("b.strings") == "array[string]"
    assert (meta.array_length("b.strings"), meta.array_length("a.bool")) == (3, None)
    assert header.tensors["blk.0.w"].shape == (3, 4)
    values = header.data("blk.0.w").view("<f4").reshape(3, 4)
    assert np.array_equal(values, np.arange(12, dtype=np.float32).reshape(3, 4))
    assert (header.tensors["blk.0.q"].type, header.tensors["blk.0.q"].shape) == ("Q4_0", (2, 64))


def test_typed_access_names_key_and_rule(sample: bytes, tmp_path: Path) -> None:
    meta = _open(tmp_path, sample).metadata
    assert (meta.integer("none", 7), meta.string("none", "x"), meta.number("a.int8")) == (
        7,
        "x",
        -3,
    )
    for call in (
        lambda: meta.integer("a.string"),
        lambda: meta.integer("a.bool"),
        lambda: meta.number("b.ints"),
        lambda: meta.string("a.int8"),
        lambda: meta.integer("none"),
        lambda: meta.raw_strings("b.ints"),
    ):
        with pytest.raises(CheckpointFormatError, match="it must be"):
            call()


def test_a_vocabulary_of_300_000_strings_opens_quickly(tmp_path: Path) -> None:
    tokens = b"".join(gguf_string(f"token{i}") for i in range(300_000))
    entry = gguf_entry("tokens", 9, struct.pack("<IQ", 8, 300_000) + tokens)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([entry]))
    header = open_gguf_header(path)
    assert header.metadata.array_length("tokens") == 300_000
    assert not header.metadata._decoded  # nothing is decoded before it is asked for


_HUGE = 1 << 62
_ARRAY = 9
_BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "bytes"),
    "short": (b"GGUF\3\0\0\0", "bytes"),
    "zip": (b"PK\3\4" + b"\0" * 40, "begins with"),
    "many tensors": (gguf_bytes(num_tensors=_HUGE), "tensors"),
    "many keys": (gguf_bytes(num_entries=_HUGE), "keys"),
    "keys beyond the end": (gguf_bytes(num_entries=5), "key|ends"),
    "empty key": (gguf_bytes([gguf_entry("", 4, b"\1\0\0\0")]), "1 to"),
    "huge key": (gguf_bytes([struct.pack("<Q", _HUGE) + b"x" * 64]), "1 to"),
    "key not utf-8": (gguf_bytes([gguf_string(b"\xff\xfe") + b"\4\0\0\0\1\0\0\0"]), "UTF-8"),
    "key twice": (gguf_bytes([gguf_entry("k", 4, b"\1\0\0\0")] * 2), "twice"),
    "no such type": (gguf_bytes([gguf_entry("k", 99, b"\0" * 8)]), "no such type"),
    "huge string": (gguf_bytes([gguf_entry("k", 8, struct.pack("<Q", _HUGE))]), "claims"),
    "string past end": (gguf_bytes([gguf_entry("k", 8, struct.pack("<Q", 9999))]), "ends"),
    "truth value 2": (gguf_bytes([gguf_entry("k", 7, b"\2")]), "truth"),
    "nested array": (
        gguf_bytes([gguf_entry("k", _ARRAY, struct.pack("<IQ", _ARRAY, 1))]),
        "arrays of arrays",
    ),
    "huge array": (
        gguf_bytes([gguf_entry("k", _ARRAY, struct.pack("<IQ", 4, _HUGE))]),
        "more than the file",
    ),
    "huge array of strings": (
        gguf_bytes([gguf_entry("k", _ARRAY, struct.pack("<IQ", 8, 1 << 24))]),
        "more than the file",
    ),
    "array string past end": (
        gguf_bytes([gguf_entry("k", _ARRAY, struct.pack("<IQQ", 8, 1, (1 << 64) - 8))]),
        "past the end",
    ),
    "alignment 3": (
        gguf_bytes([gguf_entry("general.alignment", 4, b"\3\0\0\0")]),
        "power of two",
    ),
    "alignment 0": (gguf_bytes([gguf_entry("general.alignment", 4, b"\0\0\0\0")]), "power of two"),
    "alignment 2^31": (
        gguf_bytes([gguf_entry("general.alignment", 4, struct.pack("<I", 1 << 31))]),
        "power of two",
    ),
    "tensor twice": (gguf_bytes(tensors=[_F32_TENSOR] * 2, data=_DATA), "twice"),
    "long tensor name": (gguf_bytes(tensors=[gguf_tensor("w" * 64, (8,), 0, 0)]), "1 to 63"),
    "five dimensions": (gguf_bytes(tensors=[gguf_tensor("w", (1,) * 5, 0, 0)]), "dimensions"),
    "no dimensions": (gguf_bytes(tensors=[gguf_tensor("w", (), 0, 0)]), "dimensions"),
    "zero size": (gguf_bytes(tensors=[gguf_tensor("w", (8, 0), 0, 0)]), "shape"),
    "product overflows": (
        gguf_bytes(tensors=[gguf_tensor("w", (1 << 32, 1 << 32, 1 << 32), 0, 0)], data=_DATA),
        "beyond",
    ),
    "partial group": (gguf_bytes(tensors=[gguf_tensor("w", (33,), 2, 0)], data=_DATA), "groups"),
    "offset not aligned": (gguf_bytes(tensors=[gguf_tensor("w", (8,), 0, 4)], data=_DATA), "mult"),
    "offset huge": (gguf_bytes(tensors=[gguf_tensor("w", (8,), 0, _HUGE)], data=_DATA), "beyond"),
    "overlap": (
        gguf_bytes(
            tensors=[gguf_tensor("a", (16,), 0, 0), gguf_tensor("b", (8,), 0, 32)], data=_DATA
        ),
        "overlap",
    ),
    "data cut off": (gguf_bytes(tensors=[_F32_TENSOR], data=_DATA[:-1]), "truncated"),
}


@pytest.mark.parametrize("name", sorted(_BAD_FILES))
def test_refuses(name: str, tmp_path: Path) -> None:
    data, reason = _BAD_FILES[name]
    began = time.perf_counter()
    with pytest.raises(CheckpointFormatError, match=reason) as caught:
        _open(tmp_path, data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "data",
    [
        gguf_bytes(version=1),
        gguf_bytes(version=4),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        gguf_bytes(tensors=[gguf_tensor("w", (32,), 4, 0)], data=_DATA),
    ],
    ids=["version 1", "version 4", "big-endian", "unknown tensor type"],
)
def test_refuses_unsupported(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        _open(tmp_path, data)


def test_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "absent.gguf", Path("/dev/zero")):
        with pytest.raises(CheckpointError):
            open_gguf_header(path)


def _only_albor_errors(folder: Path, data: bytes) -> None:
    """Open and read everything: anything but an AlborError fails the test by itself."""
    with contextlib.suppress(AlborError):
        header = _open(folder, data)
        for key in header.metadata:
            assert header.metadata[key] is not None
        for name, tensor in header.tensors.items():
            assert len(header.data(name)) == tensor.num_bytes


_FUZZ = settings(
    deadline=2000, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_FUZZ
@given(cut=st.integers(0, 2000))
def test_any_truncation_gives_a_clear_error(sample: bytes, tmp_path: Path, cut: int) -> None:
    _only_albor_errors(tmp_path, sample[: min(cut, len(sample))])


@_FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes_give_a_clear_error_or_a_sound_header(
    sample: bytes, tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(sample)
    for position, mask in flips:
        data[position % len(data)] ^= mask
    _only_albor_errors(tmp_path, bytes(data))


@_FUZZ
@given(
    position=st.integers(0, 4000),
    value=st.sampled_from(
        [0, 1, 255, 1 << 16, 1 << 24, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]
    ),
)
def test_edited_lengths_give_a_clear_error_or_a_sound_header(
    sample: bytes, tmp_path: Path, position: int, value: int
) -> None:
    data = bytearray(sample)
    start = position % (len(data) - 8)
    data[start : start + 8] = struct.pack("<Q", value)
    _only_albor_errors(tmp_path, bytes(data))
