"""checkpoint/safetensors.py: agreement with the reference writer, and hostile files."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albor_serve.checkpoint.safetensors import SafetensorsFile, open_safetensors
from albor_serve.errors import AlborError, CheckpointError, CheckpointFormatError


def _file(header: Any, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(begin: int = 0, end: int = 64, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4, 4], "data_offsets": [begin, end]} | changes


def _open(folder: Path, data: bytes) -> SafetensorsFile:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return open_safetensors(path)


def test_reads_what_the_reference_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(5, dtype=np.float16),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "scalar": np.array(2.5, dtype=np.float64),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    file = open_safetensors(path)
    assert set(file.tensors) == set(tensors)
    for name, array in tensors.items():
        assert file.tensors[name].shape == array.shape
        assert file.data(name).tobytes() == array.tobytes()


_BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "bytes"),
    "length beyond file": (_file({}, length=1 << 40), "claims"),
    "length over 100 MB": (_file({}, length=101 << 20), "claims"),
    "length 0": (_file({}, length=0), "claims"),
    "not json": (_file(b"{]"), "JSON"),
    "not an object": (_file([1]), "list"),
    "name twice": (_file(b'{"a": 1, "a": 2}'), "twice"),
    "entry not an object": (_file({"a": 5}), "object"),
    "unknown type": (_file({"a": _entry(dtype="F99")}), "type"),
    "type not a string": (_file({"a": _entry(dtype=["F32"])}), "type"),
    "negative size": (_file({"a": _entry(shape=[-4, -4])}), "shape"),
    "boolean size": (_file({"a": _entry(shape=[True, 16])}), "shape"),
    "nine dimensions": (_file({"a": _entry(shape=[1] * 9)}), "shape"),
    "one offset": (_file({"a": _entry(data_offsets=[0])}), "data_offsets"),
    "offsets turned round": (_file({"a": _entry(64, 0)}), "outside"),
    "beyond the file": (_file({"a": _entry(0, 128, shape=[32])}), "outside"),
    "shape too small": (_file({"a": _entry(shape=[4, 3])}), "does not fill"),
    "overflow": (_file({"a": _entry(shape=[1 << 62, 1 << 62, 16])}), "does not fill"),
    "overlap": (
        _file({"a": _entry(), "b": _entry(32, 64, shape=[8])}),
        "overlaps",
    ),
    "hole": (
        _file({"a": _entry(0, 16, shape=[4]), "b": _entry(32, 64, shape=[8])}),
        "hole",
    ),
    "bytes left over": (_file({"a": _entry(0, 32, shape=[8])}), "end at"),
    "deep nesting": (_file(b"[" * 60_000), "JSON"),
}


@pytest.mark.parametrize("name", sorted(_BAD))
def test_refuses(name: str, tmp_path: Path) -> None:
    data, reason = _BAD[name]
    with pytest.raises(CheckpointFormatError, match=reason) as caught:
        _open(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        open_safetensors(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError):
        open_safetensors(tmp_path)


_GOOD = _file(
    {
        "__metadata__": {"format": "pt"},
        "model.a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        "model.b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
    }
)
_FUZZ = settings(
    deadline=2000, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_FUZZ
@given(
    cut=st.integers(0, len(_GOOD)),
    flips=st.lists(st.tuples(st.integers(0, len(_GOOD) - 1), st.integers(1, 255)), max_size=5),
)
def test_damage_gives_a_clear_error_or_a_sound_file(
    tmp_path: Path, cut: int, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(_GOOD)
    for position, mask in flips:
        data[position] ^= mask
    with contextlib.suppress(AlborError):
        file = _open(tmp_path, bytes(data[:cut] if cut else data))
        for name, tensor in file.tensors.items():
            assert len(file.data(name)) == tensor.num_bytes
