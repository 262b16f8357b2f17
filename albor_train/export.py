"""Checkpoints to models: a bfloat16 Hugging Face folder, and GGUF files of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from albor_serve.checkpoint import open_checkpoint
from albor_serve.checkpoint.writer import QuantName
from albor_serve.convert import ConvertReport, convert
from albor_train.errors import TrainingError
from albor_train.runs import save_model_folder

__all__ = ["average", "export_folder", "export_gguf", "read_weights"]


def read_weights(checkpoint: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint, or their running average.

    Raises:
        TrainingError: there are none.
    """
    path = checkpoint / ("ema.safetensors" if ema else "model.safetensors")
    if not path.is_file():
        raise TrainingError(f"{checkpoint} has no {path.name}: give a checkpoint folder of a run")
    try:
        return dict(load_file(path))
    except Exception as error:
        raise TrainingError(f"{path} is damaged: {error}") from error


def average(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several checkpoints of one run (Izmailov et al. 2018).

    Raises:
        TrainingError: their shapes differ.
    """
    names = list(weights[0])
    for other in weights[1:]:
        if {n: t.shape for n, t in other.items()} != {n: t.shape for n, t in weights[0].items()}:
            raise TrainingError("the checkpoints have different shapes: average those of one run")
    return {name: torch.stack([w[name].float() for w in weights]).mean(0) for name in names}


def export_folder(checkpoints: Sequence[Path], out: Path, *, ema: bool = False) -> None:
    """One bfloat16 folder of one checkpoint, or of the mean of several.

    Raises:
        TrainingError: `out` exists, or the checkpoints don't fit together.
    """
    config = open_checkpoint(checkpoints[0]).config
    weights = average([read_weights(path, ema=ema) for path in checkpoints])
    save_model_folder(out, weights, config, checkpoints[0], dtype=torch.bfloat16)


def export_gguf(folder: Path, out: Path, quant: QuantName = "q4_0") -> ConvertReport:
    """The GGUF file of an exported folder; it says that the model's layout is suffix first."""
    return convert(folder, out, quant, general={"albor.fim.layout": "spm"})
