"""Model files in: Hugging Face folders and GGUF files behind one interface.

`open_checkpoint` takes either. `open_gguf_header` checks and reads the header of any GGUF file,
whatever its architecture: run it before native code touches the file.
"""

from __future__ import annotations

from pathlib import Path

from albor_serve.checkpoint.base import Checkpoint, CheckpointFormat, StoredTensor
from albor_serve.checkpoint.gguf import GgufCheckpoint, open_gguf_checkpoint
from albor_serve.checkpoint.gguf_header import (
    GgufHeader,
    GgufMetadata,
    GgufTensor,
    open_gguf_header,
)
from albor_serve.checkpoint.hf import HfCheckpoint, open_hf_checkpoint
from albor_serve.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointFormat",
    "GgufCheckpoint",
    "GgufHeader",
    "GgufMetadata",
    "GgufTensor",
    "HfCheckpoint",
    "StoredTensor",
    "open_checkpoint",
    "open_gguf_header",
]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint folder or a .gguf file. No weights are read.

    A GGUF file of an architecture that albor does not run opens too; its `config` raises.

    Raises:
        CheckpointError: there is nothing of the kind at `path`.
        CheckpointFormatError: a file is damaged, truncated or hostile.
        UnsupportedModelError: albor does not run this model.
    """
    path = Path(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)[:200]!r} cannot be a path: {error}") from error
    if not exists:
        raise CheckpointError(
            f"{path} does not exist: give a Hugging Face checkpoint folder or a .gguf file"
        )
    if not is_folder:
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
            raise CheckpointError(f"{path} is one file of a checkpoint: give its folder")
        return open_gguf_checkpoint(path)
    if not (path / "config.json").is_file():
        inside = sorted(path.glob("*.gguf"))
        if inside:
            raise CheckpointError(
                f"{path} has no config.json but {len(inside)} GGUF file(s): give one, such as "
                f"{inside[0]}"
            )
    return open_hf_checkpoint(path)
