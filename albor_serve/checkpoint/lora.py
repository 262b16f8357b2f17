"""LoRA adapters: a GGUF file as it is, or a PEFT folder written as one.

LoRA adds scale · B·A to a matrix (Hu et al. 2021, arXiv:2106.09685). PEFT's scale is alpha / rank,
or alpha / √rank for rank-stabilised adapters (Kalajdzievski 2023, arXiv:2312.03732). It is
multiplied into B here, and alpha 0 written, which llama.cpp reads as "no further scale".
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from albor_serve.checkpoint.files import read_json_object
from albor_serve.checkpoint.gguf_header import open_gguf_header
from albor_serve.checkpoint.names import gguf_name, rotary_order, rotary_rows, tensor_shapes
from albor_serve.checkpoint.safetensors import SafetensorsFile, open_safetensors
from albor_serve.config import ModelConfig
from albor_serve.errors import (
    CheckpointError,
    CheckpointFormatError,
    ConfigError,
    UnsupportedModelError,
)
from albor_serve.quant import FloatArray, dequantize

__all__ = ["LoraAdapter", "adapter_gguf", "parse_adapter", "peft_matrices"]

_MAX_CONFIG_BYTES: Final = 1 << 20
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter and how strongly it counts."""

    path: Path
    """A GGUF file or a PEFT folder."""
    scale: float = 1.0


def parse_adapter(text: str) -> LoraAdapter:
    """FILE or FILE=SCALE, as on the command line.

    Raises:
        ConfigError: the scale is no finite number.
    """
    path, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return LoraAdapter(Path(text))
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise ConfigError("--lora takes FILE or FILE=SCALE with a number such as 0.5 for SCALE")
    return LoraAdapter(Path(path), value)


@contextlib.contextmanager
def adapter_gguf(path: Path, config: ModelConfig | None) -> Iterator[Path]:
    """An adapter as a GGUF file, which is gone afterwards if it had to be written.

    Args:
        path: a GGUF file or a PEFT folder.
        config: of the model that it is for; a folder needs it.

    Raises:
        CheckpointError: there is nothing of the kind. CheckpointFormatError: it is damaged or
            does not fit the model. UnsupportedModelError: more than plain LoRA.
    """
    if not path.is_dir():
        header = open_gguf_header(path)
        kind = header.metadata.string("general.type", "model")
        if kind != "adapter" or header.metadata.string("adapter.type", "") != "lora":
            raise CheckpointFormatError(f"{path} is a GGUF file, but no LoRA adapter: check --lora")
        yield path
        return
    if config is None:
        raise UnsupportedModelError(
            f"{path} is a PEFT folder, which albor converts for Llama, Qwen2 and Qwen3 alone: "
            f"convert it to GGUF first"
        )
    matrices = peft_matrices(path, config)
    with tempfile.TemporaryDirectory(prefix="albor-lora-") as folder:
        out = Path(folder) / "adapter.gguf"
        _write(out, matrices, config)
        yield out


def peft_matrices(folder: Path, config: ModelConfig) -> dict[str, tuple[FloatArray, FloatArray]]:
    """A PEFT folder's (A, B) by the Hugging Face name of the matrix that B·A is added to.

    A is [rank, in], B [out, rank] with the adapter's own scale in it, both float32.

    Raises what `adapter_gguf` raises.
    """
    settings = read_json_object(folder / "adapter_config.json", _MAX_CONFIG_BYTES)
    alpha = _check_settings(settings, folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder} has no adapter_model.safetensors: download it as well")
    file = open_safetensors(weights)
    parts: dict[str, dict[str, FloatArray]] = {}
    for name in file.tensors:
        match = _NAME.fullmatch(name)
        if match is None:
            raise UnsupportedModelError(
                f"{folder} holds more than LoRA matrices: merge it into its model with PEFT first"
            )
        parts.setdefault(f"{match['module']}.weight", {})[match["part"]] = _read(file, name)
    shapes = tensor_shapes(config)
    matrices = {}
    for name, pair in parts.items():
        if name not in shapes or len(shapes[name]) != 2 or "layers" not in name:
            raise UnsupportedModelError(
                f"{folder} changes something else than the matrices of this model's layers: check "
                f"that the adapter was made for this model"
            )
        a, b = pair.get("A"), pair.get("B")
        if (
            a is None
            or b is None
            or a.ndim != 2
            or b.ndim != 2
            or a.shape[0] != b.shape[1]
            or not a.shape[0]
            or (b.shape[0], a.shape[1]) != shapes[name]
        ):
            raise CheckpointFormatError(
                f"{folder} does not fit the shape {shapes[name]} of {name}: check that the adapter "
                f"was made for this model"
            )
        rank = a.shape[0]
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        matrices[name] = a, b * np.float32(scale)
    if not matrices:
        raise CheckpointFormatError(f"{folder} holds no LoRA matrices: check the folder")
    return matrices


def _check_settings(settings: Mapping[str, Any], folder: Path) -> float:
    """The adapter's alpha, once it is known to be plain LoRA."""
    beyond = ("use_dora", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "use_qalora")
    found = [key for key in beyond if settings.get(key)]
    if settings.get("bias", "none") != "none":
        found.append("bias")
    if settings.get("peft_type") != "LORA" or found:
        what = ", ".join(found) or "another peft_type than LORA"
        raise UnsupportedModelError(
            f"{folder} uses {what}: merge the adapter into its model with PEFT first"
        )
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointFormatError(f"{folder}/adapter_config.json: lora_alpha must be a number")
    return float(alpha)


def _read(file: SafetensorsFile, name: str) -> FloatArray:
    tensor = file.tensors[name]
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise UnsupportedModelError(f"{file.path} holds {tensor.dtype}: save it as F32 or BF16")
    return dequantize(file.data(name), tensor.dtype, tensor.shape)


def _write(
    out: Path, matrices: Mapping[str, tuple[FloatArray, FloatArray]], config: ModelConfig
) -> None:
    import gguf  # only who converts waits for it

    writer = gguf.GGUFWriter(out, config.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)
        for name, (a, b) in matrices.items():
            heads = rotary_rows(config, name)
            rows = b
            if heads:
                rows = np.empty_like(b)
                rows[rotary_order(len(b), heads)] = b
            writer.add_tensor(f"{gguf_name(name)}.lora_a", np.ascontiguousarray(a))
            writer.add_tensor(f"{gguf_name(name)}.lora_b", np.ascontiguousarray(rows))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise CheckpointError(
            f"the converted adapter cannot be written ({error.strerror}): make room in the folder "
            f"for temporary files"
        ) from error
    finally:
        writer.close()
