"""What the loaders' fuzzer calls: bytes in, an AlborError or nothing out.

Each target takes the input as far as the server would before it answers: headers, shapes, every
weight, the tokenizer, and for GGUF a few tokens through albor's own CPU kernels, which read raw
memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from albor_serve.backends.base import ExtendStep
from albor_serve.backends.cpu import CpuBackend, unsupported
from albor_serve.checkpoint import GgufCheckpoint, open_checkpoint
from albor_serve.checkpoint.vocab import vocab_from_gguf
from albor_serve.checkpoint.writer import write_gguf
from albor_serve.errors import AlborError
from albor_serve.loader import LoadOptions, load_model
from albor_serve.tokenizer import JsonTokenizer
from fuzz.seeds import unpack_folder

__all__ = ["TARGETS", "gguf_target", "hf_target", "load_target"]

_TEXT: Final = "def f(x):\n    return 'é' + x  # <|fim_prefix|>\n"
_MAX_SEQ_LEN: Final = 32


def gguf_target(data: bytes) -> bool:
    """Open, read and run a GGUF file. Returns whether it was taken as sound."""
    with tempfile.TemporaryDirectory(dir=_ram()) as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(path)
            assert isinstance(checkpoint, GgufCheckpoint)
            vocab_from_gguf(checkpoint.header)
            with np.errstate(all="ignore"):
                for name in checkpoint.tensor_names:
                    checkpoint.read(name)
                    checkpoint.quantized(name)
                if unsupported(checkpoint) is not None:
                    return False
                _run(checkpoint)
        except AlborError as error:
            _check_message(error)
            return False
        return True


def hf_target(data: bytes) -> bool:
    """Open a packed folder, read its weights and tokenizer, and convert it to GGUF."""
    with tempfile.TemporaryDirectory(dir=_ram()) as name:
        folder = Path(name)
        for file, content in unpack_folder(data).items():
            (folder / file).write_bytes(content)
        sound = True
        try:
            tokenizer = JsonTokenizer.from_folder(folder)
            tokenizer.decode(tokenizer.encode(_TEXT, parse_special=True))
        except AlborError as error:
            _check_message(error)
            sound = False
        try:
            checkpoint = open_checkpoint(folder)
            with np.errstate(all="ignore"):
                for tensor in checkpoint.tensor_names:
                    checkpoint.read(tensor)
                write_gguf(checkpoint, folder / "tokenizer.json", folder / "out.gguf", "q8_0")
            made = open_checkpoint(folder / "out.gguf")
            assert made.tensor_names
        except AlborError as error:
            _check_message(error)
            return False
        return sound


def load_target(data: bytes) -> bool:
    """Load a GGUF file as albor-serve does, llama.cpp's reading of the vocabulary included."""
    with tempfile.TemporaryDirectory(dir=_ram()) as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(data)
        options = LoadOptions(num_slots=1, num_threads=1)
        try:
            loaded = load_model(path, options)
        except AlborError as error:
            _check_message(error)
            return False
        try:
            tokenizer = loaded.engine.tokenizer
            tokenizer.decode(tokenizer.encode(_TEXT, parse_special=True))
        except AlborError as error:
            _check_message(error)
        finally:
            loaded.engine.close()
        return True


TARGETS: Final[dict[str, Callable[[bytes], bool]]] = {
    "gguf": gguf_target,
    "hf": hf_target,
    "load": load_target,
    "foreign": load_target,
}
"""By name; foreign files are loaded by a child process first, which may crash."""


def _run(checkpoint: GgufCheckpoint) -> None:
    config = checkpoint.config
    backend = CpuBackend(checkpoint, 1, min(_MAX_SEQ_LEN, config.max_seq_len), num_threads=1)
    try:
        tokens = (0, config.vocab_size - 1)[: backend.info.max_seq_len]
        (rows,) = backend.extend([ExtendStep(0, tokens, "last")])
        assert rows.shape == (1, config.vocab_size)
    finally:
        backend.close()


def _check_message(error: AlborError) -> None:
    """A message is one line of bounded length, whatever the file says."""
    text = str(error)
    assert text, type(error).__name__
    assert "\n" not in text, f"{type(error).__name__} has several lines"
    assert len(text) < 1500, f"{type(error).__name__} has {len(text)} characters"


def _ram() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
