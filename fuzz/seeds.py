"""Small sound model files for the loaders' fuzzer, and mutants that keep their structure.

Random bytes rarely get past a parser's first check. A mutant here is a whole GGUF file or
checkpoint folder in which a few fields are wrong, so that the checks behind the first are met too.
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from albor_serve.checkpoint.gguf_header import GgufHeader, open_gguf_header
from tests.fixtures_foreign import FOREIGN
from tests.fixtures_tiny import (
    ROPE_SCALINGS,
    FileType,
    save_gguf,
    save_hf_folder,
    tiny_model,
    tiny_tokenizer_json,
)

__all__ = [
    "FOLDER_FILES",
    "foreign_seeds",
    "gguf_seeds",
    "hf_seeds",
    "mutate_gguf",
    "mutate_hf",
    "pack_folder",
    "unpack_folder",
]

INTERESTING: Final = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 255, 256, 257),
    *(512, 1023, 4096, 65535, 65536, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1, -1, -2),
)
"""Numbers at which readers go wrong."""
FLOATS: Final = (0.0, -0.0, -1.0, 1e-45, 1e-30, 1.0, 1e30, 3.4e38, float("inf"), float("nan"))
STRINGS: Final = ("", "none", "linear", "yarn", "llama", "qwen2", "qwen3", "gpt2", "\0", "é" * 99)
_CODES: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_TYPE_NUMBERS: Final = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": 7,
    "string": 8,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}
_TENSOR_NUMBERS: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
_TENSOR_GROUPS: Final = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 30: (1, 2)}
FOLDER_FILES: Final = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
"""What a packed folder may hold, in this order."""


@dataclass(slots=True)
class _Tensor:
    name: str
    shape: list[int]
    """As in the file: the row length first."""
    kind: int
    data: bytes
    offset: int | None = None
    """None lays it behind the one before."""


@dataclass(slots=True)
class _Gguf:
    """A file in parts; `build` writes it, whatever they are."""

    entries: list[tuple[str, int, Any]]
    """(key, type number, value); lists are (element type, values)."""
    tensors: list[_Tensor]
    version: int = 3
    num_entries: int | None = None
    num_tensors: int | None = None
    cuts: list[tuple[int, int]] = field(default_factory=list)

    def build(self) -> bytes:
        out = bytearray(b"GGUF")
        counts = (
            len(self.tensors) if self.num_tensors is None else self.num_tensors,
            len(self.entries) if self.num_entries is None else self.num_entries,
        )
        out += struct.pack("<IQQ", self.version, *(c % (1 << 64) for c in counts))
        for key, kind, value in self.entries:
            out += _text(key) + struct.pack("<I", kind % (1 << 32)) + _value(kind, value)
        place, data = 0, bytearray()
        for tensor in self.tensors:
            offset = place if tensor.offset is None else tensor.offset
            out += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
            out += b"".join(_scalar(10, size) for size in tensor.shape)
            out += struct.pack("<I", tensor.kind % (1 << 32)) + _scalar(10, offset)
            data += tensor.data + bytes(-len(tensor.data) % 32)
            place = len(data)
        out += bytes(-len(out) % 32) + data
        return bytes(out)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _scalar(kind: int, value: Any) -> bytes:
    code = _CODES[kind]
    if code in "fd":
        number = float(value)
        return struct.pack("<d", number) if code == "d" else struct.pack("<f", min(number, 3e38))
    size = struct.calcsize(f"<{code}")
    return (int(value) % (1 << (8 * size))).to_bytes(size, "little")


def _value(kind: int, value: Any) -> bytes:
    if kind == 8:
        return _text(str(value))
    if kind == 9:
        element, values, *claimed = value
        count = claimed[0] if claimed else len(values)
        body = b"".join(_value(element, item) for item in values)
        return struct.pack("<I", element) + _scalar(10, count) + body
    if kind not in _CODES:
        return b"\0" * 8
    return _scalar(kind, value)


def gguf_seeds() -> list[bytes]:
    """Small GGUF files: each architecture, format and rope scaling."""
    kinds: tuple[FileType, ...] = ("Q4_0", "Q8_0", "F16")
    cases: list[tuple[Any, FileType, str]] = [
        *(("llama", kind, "none") for kind in kinds),
        *((arch, "Q4_0", "none") for arch in ("qwen2", "qwen3")),
        *(("llama", "Q4_0", scaling) for scaling in ("linear", "llama3", "yarn")),
    ]
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for arch, kind, scaling in cases:
            config, weights = tiny_model(arch, rope=ROPE_SCALINGS[scaling], **_SMALL)
            path = save_gguf(
                Path(folder) / "seed.gguf",
                config,
                weights,
                file_type=kind,
                tokenizer_json=tiny_tokenizer_json(_VOCAB_SIZE),
            )
            seeds.append(path.read_bytes())
    return seeds


def foreign_seeds() -> list[bytes]:
    """Small GGUF files of architectures that only llama.cpp runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        return [save(path).read_bytes() for save in FOREIGN]


_VOCAB_SIZE: Final = 288
_SMALL: Final[dict[str, Any]] = {
    "vocab_size": _VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "max_seq_len": 64,
}


def hf_seeds() -> list[bytes]:
    """Small checkpoint folders, packed: each architecture, dtype and rope scaling."""
    seeds = []
    cases: list[tuple[Any, Any, str]] = [
        *((arch, "float16", "none") for arch in ("llama", "qwen2", "qwen3")),
        *(("llama", "bfloat16", scaling) for scaling in ("linear", "llama3", "yarn")),
    ]
    for arch, dtype, scaling in cases:
        config, weights = tiny_model(arch, rope=ROPE_SCALINGS[scaling], **_SMALL)
        with tempfile.TemporaryDirectory() as name:
            folder = save_hf_folder(
                Path(name),
                config,
                weights,
                dtype=dtype,
                tokenizer_json=tiny_tokenizer_json(_VOCAB_SIZE),
            )
            (folder / "generation_config.json").write_text('{"eos_token_id": [0, 8]}')
            seeds.append(pack_folder({f.name: f.read_bytes() for f in folder.iterdir()}))
    return seeds


def pack_folder(files: dict[str, bytes]) -> bytes:
    """One string of bytes for a folder: for each of FOLDER_FILES a length, then the bytes."""
    parts = []
    for name in FOLDER_FILES:
        data = files.get(name)
        parts.append(struct.pack("<I", 0 if data is None else len(data) + 1) + (data or b""))
    return b"".join(parts)


def unpack_folder(data: bytes) -> dict[str, bytes]:
    """The files of a packed folder; any bytes mean some folder."""
    files: dict[str, bytes] = {}
    position = 0
    for name in FOLDER_FILES:
        if position + 4 > len(data):
            break
        size = int.from_bytes(data[position : position + 4], "little")
        position += 4
        if size:
            files[name] = data[position : position + size - 1]
            position += size - 1
    return files


def mutate_gguf(seed: bytes, rng: random.Random) -> bytes:
    """A file like `seed`, which must be sound, with one to four things wrong."""
    parts = _take_apart(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _GGUF_CHANGES[rng.randrange(len(_GGUF_CHANGES))](parts, rng)
    data = parts.build()
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    return data


def _take_apart(data: bytes) -> _Gguf:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        header = open_gguf_header(Path(file.name))
        return _parts(header)


def _parts(header: GgufHeader) -> _Gguf:
    entries: list[tuple[str, int, Any]] = []
    for key in header.metadata:
        kind = header.metadata.type_name(key)
        value = header.metadata[key]
        if kind.startswith("array["):
            entries.append((key, 9, [_TYPE_NUMBERS[kind[6:-1]], value]))
        else:
            entries.append((key, _TYPE_NUMBERS[kind], value))
    tensors = [
        _Tensor(t.name, list(t.shape[::-1]), _TENSOR_NUMBERS[t.type], header.data(t.name).tobytes())
        for t in header.tensors.values()
    ]
    return _Gguf(entries, tensors, header.version)


def _change_scalar(parts: _Gguf, rng: random.Random) -> None:
    """Another value, mostly of the keys that shape the model."""
    places = [
        i for i, (key, kind, _) in enumerate(parts.entries) if kind != 9 and key != "general.name"
    ]
    i = rng.choice(places)
    key, kind, _ = parts.entries[i]
    if kind == 8:
        parts.entries[i] = (key, kind, rng.choice(STRINGS))
    else:
        parts.entries[i] = (key, kind, rng.choice(FLOATS if kind in (6, 12) else INTERESTING))


def _change_type(parts: _Gguf, rng: random.Random) -> None:
    i = rng.randrange(len(parts.entries))
    key = parts.entries[i][0]
    kind = rng.choice([*_CODES, 8, 9, 13, 1 << 31])
    value: Any = rng.choice(INTERESTING)
    if kind == 9:
        element = rng.choice([*_CODES])
        value = [element, [rng.choice((0, 1, 2)) for _ in range(rng.choice((0, 1, 2, 99)))]]
    parts.entries[i] = (key, kind, value)


def _change_array(parts: _Gguf, rng: random.Random) -> None:
    """An array shorter, longer, with other elements, or that claims more than it has."""
    places = [i for i, (_, kind, value) in enumerate(parts.entries) if kind == 9 and value[1]]
    if not places:
        return
    i = rng.choice(places)
    key, _, (element, values, *_) = parts.entries[i]
    values = list(values)
    what = rng.randrange(4)
    if what == 0:
        del values[rng.randrange(len(values)) :]
    elif what == 1:
        values += values[: rng.choice((1, 7, 300))]
    elif what == 2:
        at = rng.randrange(len(values))
        if element == 8:
            values[at] = rng.choice((*STRINGS, values[0], "\ud800", " ", "a b c", "x" * 9999))
        else:
            values[at] = rng.choice(FLOATS if element in (6, 12) else INTERESTING)
    claimed = [rng.choice(INTERESTING)] if what == 3 else []
    parts.entries[i] = (key, 9, [element, values, *claimed])


def _drop_or_repeat(parts: _Gguf, rng: random.Random) -> None:
    target: list[Any] = parts.entries if rng.random() < 0.6 else parts.tensors
    if not target:
        return
    i = rng.randrange(len(target))
    if rng.random() < 0.8:
        del target[i]
    else:
        target.append(target[i])


def _add_entry(parts: _Gguf, rng: random.Random) -> None:
    arch = rng.choice(("llama", "qwen2", "qwen3"))
    key = rng.choice(
        (
            *(f"{arch}.rope.scaling.{k}" for k in ("type", "factor", "attn_factor")),
            *(f"{arch}.{k}" for k in ("expert_count", "attention.sliding_window", "vocab_size")),
            *(f"{arch}.rope.scaling.yarn_{k}" for k in ("beta_fast", "beta_slow")),
            *("split.count", "general.alignment", "albor.eos_token_ids", "albor.fim.layout"),
            *(f"tokenizer.ggml.{k}" for k in ("eot_token_id", "eom_token_id", "fim_pre_token_id")),
            *("tokenizer.ggml.scores", "albor.rope.low_freq_factor", "tokenizer.chat_template"),
        )
    )
    kind = rng.choice((4, 5, 6, 8, 9, 10, 12))
    value: Any = rng.choice(INTERESTING)
    if kind in (6, 12):
        value = rng.choice(FLOATS)
    elif kind == 8:
        value = rng.choice(STRINGS)
    elif kind == 9:
        value = [rng.choice((5, 6)), [rng.choice(INTERESTING) for _ in range(3)]]
    parts.entries.append((key, kind, value))


def _change_tensor(parts: _Gguf, rng: random.Random) -> None:
    if not parts.tensors:
        return
    tensor = rng.choice(parts.tensors)
    what = rng.randrange(5)
    if what == 0:
        tensor.shape[rng.randrange(len(tensor.shape))] = rng.choice(INTERESTING)
    elif what == 1:
        tensor.kind = rng.choice((0, 1, 2, 3, 8, 12, 14, 24, 28, 30, 39, 99))
    elif what == 2:
        tensor.offset = rng.choice((*INTERESTING, *(32 * n for n in range(8))))
    elif what == 3:
        tensor.name = rng.choice((parts.tensors[0].name, "", "blk.1.attn_q.weight", "x" * 64))
    else:
        rng.shuffle(tensor.shape)


def _change_data(parts: _Gguf, rng: random.Random) -> None:
    """Hostile weights: infinities, NaNs, huge scales."""
    if not parts.tensors:
        return
    tensor = rng.choice(parts.tensors)
    pattern = rng.choice((b"\xff\x7f", b"\x00\x7c", b"\xff\xff", b"\x00\x00\xc0\x7f", b"\xff\x7b"))
    tensor.data = (pattern * (len(tensor.data) // len(pattern) + 1))[: len(tensor.data)]


def _reshape_model(parts: _Gguf, rng: random.Random) -> None:
    """One size changed consistently in the metadata and in every tensor that has it."""
    sizes = {288: (1, 31, 289), 32: (8, 16, 48, 64, 96), 16: (8, 24, 32, 40), 64: (1, 32, 63)}
    old = rng.choice(tuple(sizes))
    new = rng.choice(sizes[old])
    for i, (key, kind, value) in enumerate(parts.entries):
        if kind in (4, 5, 10) and value == old:
            parts.entries[i] = (key, kind, new)
    for tensor in parts.tensors:
        tensor.shape = [new if size == old else size for size in tensor.shape]
        group, size = _TENSOR_GROUPS.get(tensor.kind, (1, 4))
        count = 1
        for dim in tensor.shape:
            count *= dim % 4096
        tensor.data = (tensor.data * 9)[: count // group * size]


def _change_counts(parts: _Gguf, rng: random.Random) -> None:
    what = rng.randrange(3)
    if what == 0:
        parts.version = rng.choice((0, 1, 2, 4, 3 << 24))
    elif what == 1:
        parts.num_entries = rng.choice(INTERESTING)
    else:
        parts.num_tensors = rng.choice(INTERESTING)


_GGUF_CHANGES: Final[tuple[Callable[[_Gguf, random.Random], None], ...]] = (
    *(_change_scalar, _change_scalar, _change_scalar, _change_type, _change_array),
    *(_change_array, _drop_or_repeat, _add_entry, _change_tensor, _change_tensor),
    *(_change_data, _reshape_model, _reshape_model, _change_counts),
)


def mutate_hf(seed: bytes, rng: random.Random) -> bytes:
    """A packed folder like `seed` with one to four things wrong in its JSON."""
    files = unpack_folder(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice((*FOLDER_FILES, *(name for name in FOLDER_FILES[:3] for _ in range(2))))
        data = files.get(name)
        if rng.random() < 0.02:
            files.pop(name, None)
        elif name == "model.safetensors" and data is not None:
            files[name] = _change_safetensors(data, rng)
        elif data is None:
            files[name] = rng.choice((b"{}", b"[]", b"", b'{"weight_map": {"a": "../x"}}'))
        else:
            files[name] = _change_json(data, rng)
    return pack_folder(files)


def _change_safetensors(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.1:
        body = body[: rng.randrange(len(body) + 1)]
    header = _change_json(header, rng)
    length = len(header) if rng.random() < 0.9 else rng.choice(INTERESTING) % (1 << 64)
    return length.to_bytes(8, "little") + header + body


def _change_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove or add something somewhere inside a JSON document."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    node: Any = document
    while isinstance(node, dict | list) and node:
        key: Any = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        child = node[key]
        if isinstance(child, dict | list) and child and rng.random() < 0.8:
            node = child
            continue
        what = rng.random()
        if what < 0.15:
            del node[key]
        elif what < 0.3 and isinstance(node, dict):
            node[rng.choice(("", "id", "type", "\ud800", "shape", str(key) + "x"))] = child
        else:
            node[key] = _any_json(rng, child)
        break
    text = json.dumps(document).encode()
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.05 else text


def _any_json(rng: random.Random, old: Any) -> Any:
    number: Any = rng.choice((*INTERESTING, *FLOATS, 10**400, -(10**30)))
    choices: list[Any] = [None, True, False, [], {}, [old], {"type": old}, number, number, number]
    choices += [rng.choice(STRINGS), "\ud800", "a" * 5000, [[[[]]]], [number, number]]
    return rng.choice(choices)
