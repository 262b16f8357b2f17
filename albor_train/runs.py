"""A run's folder: checkpoints that are whole or absent, and a log line for each step.

RUN/spec.json          the spec, and its hash
RUN/log.jsonl          one line a step, one for each event
RUN/checkpoints/step-NNNNNN/
    model.safetensors      float32 weights under Hugging Face names
    optimizer.safetensors  moments
    ema.safetensors        averaged weights, if the spec asks for them
    state.json             step, clipper, packs
    config.json, tokenizer.json, ...   so that the folder loads as a model
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from albor_serve.config import ModelConfig
from albor_train.artefact import write_json
from albor_train.errors import TrainingError

__all__ = [
    "Log",
    "TrainingState",
    "hf_config",
    "latest_checkpoint",
    "load_state",
    "read_log",
    "save_model_folder",
    "save_state",
]

_STEP: Final = re.compile(r"step-(\d{6})")
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything that the next step depends on."""

    step: int
    """Steps done."""
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    """Empty without averaging."""
    facts: Mapping[str, Any]
    """JSON-like: clipper, running loss, packs, spec hash."""
    rng: Tensor
    """torch's CPU generator."""


def hf_config(config: ModelConfig, dtype: str) -> dict[str, object]:
    """config.json for transformers, llama.cpp's converter and vLLM."""
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 4,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_sliding_window": False,
    }


def save_model_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Path,
    *,
    dtype: torch.dtype,
) -> None:
    """Write a Hugging Face folder; it appears under its name only when complete.

    Raises:
        TrainingError: the folder exists, or a weight is not finite.
    """
    if folder.exists():
        raise TrainingError(f"{folder} exists and is never overwritten: give another name")
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(f"{name} holds values that are not finite: nothing was saved")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        _write_model(temporary, weights, config, tokenizer, dtype)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Path,
    dtype: torch.dtype,
) -> None:
    stored = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", hf_config(config, str(dtype).removeprefix("torch.")))
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)


def save_state(
    run: Path, state: TrainingState, config: ModelConfig, tokenizer: Path, keep: int
) -> Path:
    """Write a checkpoint and remove all but the last `keep`.

    Raises:
        TrainingError: a weight or moment is not finite, or the step was saved before; nothing is
            written then.
    """
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    if folder.exists():
        raise TrainingError(f"{folder} exists and is never overwritten: give another run folder")
    for group in (state.weights, state.moments, state.ema):
        for name, tensor in group.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"step {state.step}: {name} holds values that are not finite: the checkpoint "
                    f"was not saved"
                )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        _write_model(temporary, state.weights, config, tokenizer, torch.float32)
        for name, group in (("optimizer", state.moments), ("ema", state.ema)):
            if group:
                stored = {key: value.detach().cpu().contiguous() for key, value in group.items()}
                save_file(stored, temporary / f"{name}.safetensors")
        facts = {**state.facts, "step": state.step, "rng": bytes(state.rng.tolist()).hex()}
        write_json(temporary / "state.json", facts)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    saved = sorted(path for path in folder.parent.iterdir() if _STEP.fullmatch(path.name))
    for old in saved[:-keep]:
        shutil.rmtree(old)
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name))
    return found[-1] if found else None


def load_state(folder: Path) -> TrainingState:
    """Read a checkpoint; its tensors are on the CPU.

    Raises:
        TrainingError: it is incomplete or damaged.
    """
    try:
        facts = json.loads((folder / "state.json").read_text("utf-8"))
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        ema_path = folder / "ema.safetensors"
        ema = load_file(ema_path) if ema_path.exists() else {}
        rng = torch.tensor(list(bytes.fromhex(facts.pop("rng"))), dtype=torch.uint8)
        step = int(facts.pop("step"))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"{folder} is no sound checkpoint: {reason}") from error
    return TrainingState(step, weights, moments, ema, facts, rng)


class Log:
    """log.jsonl, one object a line. Opening at a step drops what later steps wrote."""

    def __init__(self, path: Path, from_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in read_log(path) if line["step"] < from_step]
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                text = "".join(json.dumps(line) + "\n" for line in kept)
                temporary.write_text(text, "utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line and flush it."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line cut off by a crash is left out."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
