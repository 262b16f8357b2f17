"""What every checkpoint offers, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from albor_serve.config import ModelConfig
from albor_serve.quant import ByteArray, FloatArray

__all__ = ["Checkpoint", "CheckpointFormat", "StoredTensor"]

CheckpointFormat = Literal["hf", "gguf"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's bytes as they are stored."""

    format: str
    """One of quant.FORMATS, or another ggml name that quant cannot decode."""
    shape: tuple[int, ...]
    """Outermost dimension first; the last is the row length."""
    data: ByteArray
    """uint8, read-only. [rows, row_bytes] for a matrix, [num_bytes] for a vector."""


@runtime_checkable
class Checkpoint(Protocol):
    """A model's weights under their Hugging Face names, such as
    "model.layers.0.self_attn.q_proj.weight".

    Only the tensors that `config` calls for are listed, and they are all there, in the right
    shapes. A tied output head is not listed. Weights stay in the file until they are read;
    several threads may read at once.
    """

    @property
    def path(self) -> Path:
        """The folder or the .gguf file."""

    @property
    def format(self) -> CheckpointFormat:
        """How it is stored."""

    @property
    def name(self) -> str:
        """For people and for the model list: the folder's name or the file's without ".gguf"."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model.

        Raises UnsupportedModelError if albor does not run it (GGUF only: a folder is checked when
        it is opened), CheckpointFormatError if tensors are missing or have other shapes.
        """

    @property
    def tensor_names(self) -> Sequence[str]:
        """All tensors, embeddings first, then layer by layer. Raises what `config` raises."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, outermost dimension first. KeyError for a name not listed."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """Rows start to stop of one tensor (elements of a vector) as a new float32 array.

        KeyError for a name not listed; UnsupportedModelError for a format quant cannot decode.
        """

    def quantized(self, name: str) -> StoredTensor:
        """One tensor's bytes, rows in the order of `read`. KeyError for a name not listed."""
