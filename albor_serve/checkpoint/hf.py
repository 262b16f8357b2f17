"""Hugging Face checkpoint folders: config.json and safetensors.

Pickled weights (pytorch_model.bin, *.pt) are never opened: unpickling runs code from the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from albor_serve.checkpoint.base import CheckpointFormat, StoredTensor
from albor_serve.checkpoint.files import read_json_object
from albor_serve.checkpoint.names import tensor_shapes
from albor_serve.checkpoint.safetensors import SafetensorsFile, open_safetensors
from albor_serve.config import Architecture, ModelConfig, RopeConfig
from albor_serve.errors import (
    CheckpointError,
    CheckpointFormatError,
    ConfigError,
    UnsupportedModelError,
)
from albor_serve.quant import FloatArray, dequantize

__all__ = ["HfCheckpoint", "model_config_from_hf", "open_hf_checkpoint", "weight_files"]

_MAX_CONFIG_BYTES: Final = 4 << 20
_MAX_INDEX_BYTES: Final = 64 << 20
_MAX_FILES: Final = 4096
_INDEX_NAME: Final = "model.safetensors.index.json"
_SINGLE_NAME: Final = "model.safetensors"

_CLASSES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_HEAD_DIM_DEFAULTS: Final[Mapping[str, int]] = {"qwen3": 128}
_FLOAT_DTYPES: Final = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class HfCheckpoint:
    """An opened folder. Implements base.Checkpoint."""

    path: Path
    config: ModelConfig
    _shapes: Mapping[str, tuple[int, ...]]
    _files: Mapping[str, SafetensorsFile]
    """For each tensor, the file that holds it."""

    @property
    def format(self) -> CheckpointFormat:
        """Always "hf"."""
        return "hf"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def tensor_names(self) -> Sequence[str]:
        """See base.Checkpoint."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See base.Checkpoint."""
        return self._shapes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """See base.Checkpoint."""
        stored = self.quantized(name)
        rows = stored.data.reshape(stored.shape[0], -1)[start:stop]
        return dequantize(rows, stored.format, (len(rows), *stored.shape[1:]))

    def quantized(self, name: str) -> StoredTensor:
        """See base.Checkpoint."""
        shape = self._shapes[name]
        file = self._files[name]
        data = file.data(name)
        if len(shape) > 1:
            data = data.reshape(shape[0], -1)
        return StoredTensor(file.tensors[name].dtype, shape, data)


def open_hf_checkpoint(folder: Path) -> HfCheckpoint:
    """Open a folder and check that config and tensors agree. No weights are read.

    Raises:
        CheckpointError: a needed file is missing.
        CheckpointFormatError: a file is damaged, or tensors are missing or have other shapes.
        UnsupportedModelError: albor does not run this model.
    """
    paths = weight_files(folder)
    raw = read_json_object(folder / "config.json", _MAX_CONFIG_BYTES)
    generation: dict[str, Any] | None = None
    if (folder / "generation_config.json").is_file():
        generation = read_json_object(folder / "generation_config.json", _MAX_CONFIG_BYTES)
    try:
        config = model_config_from_hf(raw, generation)
    except CheckpointError as error:
        raise type(error)(f"{folder / 'config.json'}: {error}") from error
    files: dict[str, SafetensorsFile] = {}
    for path in paths:
        file = open_safetensors(path)
        for name in file.tensors:
            if name in files:
                raise CheckpointFormatError(
                    f"{path} repeats tensor {name[:80]!r} of {files[name].path.name}: remove the "
                    f"weight files that do not belong to the model"
                )
            files[name] = file
    shapes = tensor_shapes(config)
    _check_tensors(folder, config, shapes, files)
    return HfCheckpoint(folder, config, shapes, files)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint folder, in order; they need not be sound.

    Raises CheckpointError where there are none, CheckpointFormatError for a damaged index.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: give a Hugging Face checkpoint folder or a .gguf file"
        )
    if (folder / _INDEX_NAME).is_file():
        return _indexed_files(folder)
    if (folder / _SINGLE_NAME).is_file():
        return (folder / _SINGLE_NAME,)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds only pickled weights, which can run code when they are loaded: save "
            f"the model as safetensors (model.save_pretrained(..., safe_serialization=True))"
        )
    raise CheckpointError(
        f"{folder} has neither {_SINGLE_NAME} nor {_INDEX_NAME}: download the weights as well"
    )


def _indexed_files(folder: Path) -> tuple[Path, ...]:
    index = folder / _INDEX_NAME
    weight_map = read_json_object(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{index} has no weight_map: download it again")
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > _MAX_FILES:
        raise CheckpointFormatError(
            f"{index} names {len(names)} files, at most {_MAX_FILES} may be"
        )
    for name in names:
        plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointFormatError(
                f"{index} names {name[:80]!r}: only .safetensors files beside it are allowed"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: download all weight files")
    return tuple(folder / name for name in names)


def _check_tensors(
    folder: Path,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[str, SafetensorsFile],
) -> None:
    for name, shape in shapes.items():
        if name not in files:
            hint = ""
            if name == "lm_head.weight":
                hint = "; if the model ties it to the embedding, set tie_word_embeddings"
            raise CheckpointFormatError(
                f"{folder} lacks tensor {name!r}, which its config.json calls for{hint}: download "
                f"all weight files"
            )
        found = files[name].tensors[name]
        if found.shape != shape:
            raise CheckpointFormatError(
                f"{folder}: tensor {name!r} has shape {found.shape}, config.json calls for {shape}"
            )
        if found.dtype not in _FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"{folder}: tensor {name!r} is stored as {found.dtype}, albor reads "
                f"{', '.join(_FLOAT_DTYPES)}: use the unquantized checkpoint or a GGUF file"
            )
    for name in files:
        ignored = name.endswith(".rotary_emb.inv_freq")
        ignored = ignored or (name == "lm_head.weight" and config.tie_embeddings)
        if name not in shapes and not ignored:
            raise UnsupportedModelError(
                f"{folder} has tensor {name[:80]!r}, which a {config.architecture} model as albor "
                f"runs it does not have: convert it to GGUF and serve it on CPU"
            )


def model_config_from_hf(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The model's shape from the objects in config.json and generation_config.json.

    Reads the forms of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters).

    Raises:
        UnsupportedModelError: an architecture or a feature that albor does not run.
        CheckpointFormatError: a field is missing or makes no sense.
    """
    architecture = _architecture(raw)
    _reject_features(raw)
    reader = _Fields(raw)
    hidden_size = reader.count("hidden_size")
    num_heads = reader.count("num_attention_heads")
    num_layers = reader.count("num_hidden_layers")
    max_seq_len = reader.count("max_position_embeddings")
    head_dim = reader.count("head_dim", _HEAD_DIM_DEFAULTS.get(architecture, -1))
    if head_dim == -1:
        if hidden_size % num_heads:
            raise CheckpointFormatError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
                f"and head_dim is not given"
            )
        head_dim = hidden_size // num_heads
    _reject_sliding_window(raw, architecture, num_layers)
    try:
        rope = _rope(raw, max_seq_len)
        if rope.scaling == "yarn":
            max_seq_len = max(max_seq_len, int(rope.factor * rope.original_max_seq_len))
        return ModelConfig(
            architecture=architecture,
            vocab_size=reader.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=reader.count("num_key_value_heads", num_heads),
            head_dim=head_dim,
            max_seq_len=max_seq_len,
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope=rope,
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tie_embeddings=reader.flag("tie_word_embeddings", False),
            bos_token_id=_first(_token_ids(raw, "bos_token_id")),
            eos_token_ids=_eos_ids(raw, generation),
        )
    except ConfigError as error:
        raise CheckpointFormatError(str(error)) from error


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise UnsupportedModelError(
            f"model_type is {kind!r:.40}: albor runs {', '.join(_CLASSES)}; on CPU, a GGUF "
            f"file of any architecture that llama.cpp knows can be served"
        )
    classes = raw.get("architectures")
    if isinstance(classes, list) and classes and _CLASSES[kind] not in classes:
        raise UnsupportedModelError(
            f"architectures is {classes!r:.80}: only {_CLASSES[kind]} can complete text"
        )
    return cast("Architecture", kind)


def _reject_features(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"hidden_act is {raw['hidden_act']!r:.40}: albor runs 'silu' only"
        )
    if raw.get("quantization_config") is not None:
        raise UnsupportedModelError(
            "the checkpoint is quantized (quantization_config): use the unquantized one or a "
            "GGUF file"
        )
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            raise UnsupportedModelError(
                f"{key} is {raw[key]!r:.40}: mixtures of experts are not run"
            )
    if raw.get("mlp_bias"):
        raise UnsupportedModelError("mlp_bias is set: albor runs MLPs without biases only")
    if raw.get("attention_bias") and raw["model_type"] != "qwen2":
        raise UnsupportedModelError(
            f"attention_bias is set: albor runs {raw['model_type']} without attention biases only"
        )
    if raw.get("partial_rotary_factor", 1.0) not in (1, None):
        raise UnsupportedModelError(
            f"partial_rotary_factor is {raw['partial_rotary_factor']!r:.40}: albor rotates whole "
            f"heads"
        )


def _reject_sliding_window(raw: Mapping[str, Any], architecture: str, num_layers: int) -> None:
    """Refuse a sliding window that is in use; Qwen configs often carry one that is not."""
    kinds = raw.get("layer_types")
    if isinstance(kinds, list):
        in_use = any(kind != "full_attention" for kind in kinds)
    elif architecture == "llama":
        in_use = raw.get("sliding_window") is not None
    else:
        first = raw.get("max_window_layers", 28)
        window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
        in_use = window is not None and (not isinstance(first, int) or first < num_layers)
    if in_use:
        raise UnsupportedModelError(
            "some layers use sliding-window or linear attention: albor runs full attention only"
        )


def _rope(raw: Mapping[str, Any], max_seq_len: int) -> RopeConfig:
    params = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(params, dict):
        raise CheckpointFormatError("rope_parameters must be an object")
    if any(isinstance(value, dict) for value in params.values()):
        raise UnsupportedModelError("rope_parameters differ between layers: not run by albor")
    reader = _Fields(params)
    theta = reader.number("rope_theta", _Fields(raw).number("rope_theta", 10_000.0))
    if params.get("partial_rotary_factor", 1.0) not in (1, None):
        raise UnsupportedModelError("partial_rotary_factor is set: albor rotates whole heads")
    scaling = params.get("rope_type", params.get("type")) or "default"
    original = reader.count(
        "original_max_position_embeddings",
        _Fields(raw).count("original_max_position_embeddings", max_seq_len),
    )
    if scaling == "default":
        return RopeConfig(theta=theta)
    if scaling == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=reader.number("factor"))
    if scaling == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=reader.number("factor"),
            original_max_seq_len=original,
            low_freq_factor=reader.number("low_freq_factor"),
            high_freq_factor=reader.number("high_freq_factor"),
        )
    if scaling == "yarn":
        if params.get("truncate", True) is not True:
            raise UnsupportedModelError("yarn scaling with truncate=false is not run by albor")
        factor = reader.number("factor", max_seq_len / original)
        return RopeConfig(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_max_seq_len=original,
            beta_fast=reader.number("beta_fast", 32.0),
            beta_slow=reader.number("beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(reader, factor),
        )
    raise UnsupportedModelError(
        f"rope scaling {scaling!r:.40} is not run by albor: it runs linear, llama3 and yarn"
    )


def _yarn_attention_factor(params: _Fields, factor: float) -> float | None:
    """Scale of cos and sin where the config sets it, as transformers derives it."""
    given = params.number("attention_factor", 0.0)
    if given:
        return given
    mscale, mscale_all = params.number("mscale", 0.0), params.number("mscale_all_dim", 0.0)
    if mscale and mscale_all and factor > 1:
        growth = 0.1 * math.log(factor)
        return (growth * mscale + 1) / (growth * mscale_all + 1)
    return None


def _token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 1 << 31:
            raise CheckpointFormatError(f"{key} is {value!r:.40}: it must be token ids")
    return tuple(ids)


def _first(ids: Sequence[int]) -> int | None:
    return ids[0] if ids else None


def _eos_ids(raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """generation_config.json names every token that ends an answer; config.json often only one."""
    ids = _token_ids(generation or {}, "eos_token_id") + _token_ids(raw, "eos_token_id")
    return tuple(dict.fromkeys(ids))


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to a JSON object; null counts as absent."""

    raw: Mapping[str, Any]

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise CheckpointFormatError(
                f"{key} is {value!r:.40}: it must be a positive whole number"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointFormatError(f"{key} is {value!r:.40}: it must be a number")
        if not abs(value) < 1e30:
            raise CheckpointFormatError(f"{key} is {value!r:.40}: it must be a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointFormatError(f"{key} is {value!r:.40}: it must be true or false")
        return value
