"""A child of albor-bench gpu: measures one engine and writes its rows as lines of JSON.

Needs torch, numpy and Triton; the GGUF file for llama-bench and models from files need gguf, too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from albor_serve.bench.gpu import GpuJob
from albor_serve.bench.gpu_rows import GpuRow
from albor_serve.bench.shapes import SHAPES, shape_gguf
from albor_serve.config import ModelConfig
from albor_serve.errors import BackendError

__all__ = ["main", "model_config"]

ROOM: Final = 512
"""Positions beyond the longest context."""


def main(arguments: Sequence[str]) -> int:
    """Run `ENGINE JOB`; returns the exit code."""
    engine, job = arguments[0], GpuJob.from_json(arguments[1])
    if engine == "gguf":
        print(shape_gguf(job.shape))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU", file=sys.stderr)
        return 1
    if engine == "machine":
        from albor_serve.bench.gpu_timing import describe_gpu

        _write({"machine": describe_gpu()})
    elif engine == "albor":
        from albor_serve.bench.gpu_albor import measure_albor

        measure_albor(job, _put)
    else:
        from albor_serve.bench.gpu_torch import measure_torch

        measure_torch(engine, job, model_config(job), _put)
    return 0


def model_config(job: GpuJob) -> ModelConfig:
    """The shape to measure, with room for the longest context.

    Raises:
        BackendError: the package gguf, which reads files, is not installed.
    """
    needed = max((*job.contexts, *job.prompts)) + ROOM
    if job.model is None:
        config = SHAPES[job.shape]
    else:
        try:
            from albor_serve.checkpoint.gguf import open_gguf_checkpoint
        except ImportError as error:
            raise BackendError(f"reading {job.model} needs {error.name}: install it") from error
        config = open_gguf_checkpoint(Path(job.model)).config
    return dataclasses.replace(config, max_seq_len=max(config.max_seq_len, needed))


def _put(row: GpuRow) -> None:
    _write({"row": dataclasses.asdict(row)})


def _write(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
