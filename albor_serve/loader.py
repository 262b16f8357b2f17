"""From what a person names to a running model: embedded, GGUF file or Hugging Face folder."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from albor_serve.backends.base import Backend
from albor_serve.backends.calibrate import calibrate
from albor_serve.backends.cpu import CpuBackend, unsupported
from albor_serve.backends.fallback import Fallback
from albor_serve.backends.llamacpp import LlamaCppBackend, LlamaCppVocabulary
from albor_serve.backends.llamacpp_tokenizer import LlamaCppTokenizer, choose_tokenizer
from albor_serve.checkpoint import GgufCheckpoint
from albor_serve.checkpoint.gguf_header import GgufHeader, open_gguf_header
from albor_serve.checkpoint.lora import LoraAdapter, adapter_gguf
from albor_serve.checkpoint.preflight import check_for_native, is_wholly_checked
from albor_serve.config import EngineConfig, ModelConfig
from albor_serve.engine import Engine
from albor_serve.errors import (
    AlborError,
    CheckpointError,
    CheckpointFormatError,
    ConfigError,
    UnsupportedModelError,
)
from albor_serve.fim import FimTemplate, detect_template
from albor_serve.kernels.cpu_decode import best_instruction_set
from albor_serve.token_memo import LineMemoTokenizer, can_be_cut_at_lines
from albor_serve.tokenizer import Tokenizer

__all__ = [
    "EMBEDDED_MODEL",
    "BackendChoice",
    "FallbackChoice",
    "LoadOptions",
    "LoadedModel",
    "OpenBackend",
    "embedded_name",
    "load_model",
    "needed_bytes",
    "open_backend",
]

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "albor-33m-q4_0.gguf"
MAX_DEFAULT_SEQ_LEN = 4096
"""Models made for 128k tokens would take gigabytes of KV cache: more is for --ctx to ask for."""
CALIBRATION_MS = 150.0

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of it is, 0.0 to 1.0."""


BackendChoice = Literal["auto", "cpu", "cuda", "llamacpp"]
"""Who computes: albor's own CPU kernels, its GPU kernels, llama.cpp. auto is cpu where that is
fast, else llamacpp; the GPU is for who asks."""
FallbackChoice = Literal["none", "cpu"]
"""Who computes where the GPU fails, at the start or later."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a person may choose about a model's loading."""

    num_slots: int = 4
    max_seq_len: int | None = None
    """Tokens each slot holds; None takes the model's own length, 4096 at most."""
    num_threads: int | None = None
    """None takes the machine's physical cores and follows its load."""
    speculate: bool = True
    backend: BackendChoice = "auto"
    fallback: FallbackChoice = "none"
    adapters: tuple[LoraAdapter, ...] = ()
    """LoRA adapters; models with some run on llama.cpp, which computes them beside the weights."""


@dataclass(frozen=True, slots=True)
class OpenBackend:
    """A backend, the tokenizer inside its file, and what the file is."""

    backend: Backend
    tokenizer: LlamaCppTokenizer
    """It lives as long as the backend is open."""
    kind: str
    """Architecture, size and format, for people."""
    fallback: Fallback | None = None
    """What to go on with when the device fails. The tokenizer then lives until its `release`."""
    degraded: str | None = None
    """Why this is not the backend that was asked for; None if it is."""


def open_backend(
    checkpoint: GgufCheckpoint,
    num_slots: int,
    max_seq_len: int,
    *,
    choice: BackendChoice = "auto",
    fallback: FallbackChoice = "none",
    num_threads: int | None = None,
    progress: Callable[[float], None] | None = None,
    adapters: Sequence[LoraAdapter] = (),
) -> OpenBackend:
    """Load a GGUF file into the backend that runs it fastest here.

    With `fallback` "cpu" a `choice` of "cuda" that can't be had is not an error: the CPU computes.

    Raises:
        ConfigError: `choice` is "cpu" or "cuda" and albor's kernels can't run this model here, or
            not with adapters.
        What LlamaCppBackend.load, CpuBackend, CudaBackend and adapter_gguf raise.
    """
    path = checkpoint.path
    if adapters:
        if choice in ("cpu", "cuda"):
            raise ConfigError(f"albor's own kernels take no --lora: leave out --backend {choice}")
        choice = "llamacpp"
    if choice == "cuda":
        if fallback == "none":
            return _open_cuda(checkpoint, num_slots, max_seq_len, progress)

        def open_cpu(progress: Callable[[float], None] | None = None) -> OpenBackend:
            return open_backend(
                checkpoint, num_slots, max_seq_len, num_threads=num_threads, progress=progress
            )

        try:
            return _open_cuda(
                checkpoint, num_slots, max_seq_len, progress, lambda: open_cpu().backend
            )
        except AlborError as error:
            opened = open_cpu(progress)
            logger.warning("the CPU computes, because %s", error)
            return replace(opened, degraded=str(error))
    # The kernels for AVX2 and AVX-VNNI do not beat llama.cpp yet: they are for who asks.
    if choice == "cpu" or (choice == "auto" and best_instruction_set() == "avx512"):
        reason = unsupported(checkpoint)
        if reason is None:
            return _open_own(checkpoint, num_slots, max_seq_len, num_threads, progress)
        if choice == "cpu":
            raise ConfigError(
                f"albor's CPU kernels can't run {path.name}: {reason}; leave out --backend cpu"
            )
    with contextlib.ExitStack() as files:
        config = _config_for(adapters, checkpoint)
        native = LlamaCppBackend.load(
            path,
            num_slots,
            max_seq_len,
            num_threads=num_threads,
            progress=progress,
            adapters=[
                (files.enter_context(adapter_gguf(adapter.path, config)), adapter.scale)
                for adapter in adapters
            ],
        )
    info = native.model_info
    # llama.cpp prints "?B" for sizes that it has no name for.
    kind = f"{info.description.replace('?B ', '')}, {info.num_parameters / 1e6:.0f}M parameters"
    return OpenBackend(native, native.tokenizer, kind)


def _open_cuda(
    checkpoint: GgufCheckpoint,
    num_slots: int,
    max_seq_len: int,
    progress: Callable[[float], None] | None,
    open_fallback: Callable[[], Backend] | None = None,
) -> OpenBackend:
    """The GPU kernels, with the vocabulary as llama.cpp reads it."""
    try:
        # torch takes seconds to import, so only here.
        from albor_serve.backends import cuda
    except (ImportError, OSError) as error:  # OSError: torch without one of its libraries
        raise ConfigError(
            "--backend cuda needs torch and Triton: pip install 'albor[gpu]'"
        ) from error
    reason = cuda.unsupported(checkpoint)
    if reason is not None:
        raise ConfigError(
            f"the GPU kernels can't run {checkpoint.path.name} here: {reason}; leave out "
            "--backend cuda"
        )
    vocabulary = LlamaCppVocabulary(checkpoint.path)
    fallback = None
    on_close: Callable[[], None] | None = vocabulary.close
    if open_fallback is not None:
        # The tokenizer outlives this backend.
        fallback, on_close = Fallback("the CPU", open_fallback, vocabulary.close), None
    try:
        backend = cuda.CudaBackend.from_gguf(
            checkpoint, num_slots, max_seq_len, progress, on_close=on_close
        )
    except BaseException:
        vocabulary.close()
        raise
    config = checkpoint.config
    kind = f"{config.architecture} Q4_0, {config.num_parameters / 1e6:.0f}M parameters"
    return OpenBackend(backend, vocabulary.tokenizer, kind, fallback)


def _config_for(adapters: Sequence[LoraAdapter], checkpoint: GgufCheckpoint) -> ModelConfig | None:
    """The model's config where an adapter's conversion needs it and albor knows it."""
    if not any(adapter.path.is_dir() for adapter in adapters):
        return None
    try:
        return checkpoint.config
    except UnsupportedModelError:
        return None


def _open_own(
    checkpoint: GgufCheckpoint,
    num_slots: int,
    max_seq_len: int,
    num_threads: int | None,
    progress: Callable[[float], None] | None,
) -> OpenBackend:
    """Albor's own kernels, with the vocabulary as llama.cpp reads it."""
    config = checkpoint.config
    vocabulary = LlamaCppVocabulary(checkpoint.path)
    try:
        backend = CpuBackend(
            checkpoint, num_slots, max_seq_len, num_threads, progress, on_close=vocabulary.close
        )
    except BaseException:
        vocabulary.close()
        raise
    stored = checkpoint.tensor_format("model.layers.0.mlp.down_proj.weight")
    kind = f"{config.architecture} {stored}, {config.num_parameters / 1e6:.0f}M parameters"
    return OpenBackend(backend, vocabulary.tokenizer, kind)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine, not started yet, and what is known of its model."""

    name: str
    description: str
    engine: Engine
    template: FimTemplate | None
    load_s: float


def load_model(
    source: Path | None, options: LoadOptions, progress: Progress | None = None
) -> LoadedModel:
    """Load a .gguf file, a Hugging Face folder (converted once, then cached) or, for None, the
    embedded model.

    Raises:
        CheckpointError: there is no such model or it can't be used. ConfigError: it does not fit
            into memory, or an option is out of range. BackendError: llama.cpp failed.
    """
    started = time.perf_counter()
    report = progress or (lambda _text, _part: None)
    path, folder = _resolve(source, report)
    header = open_gguf_header(path)
    check_for_native(header)
    config = _engine_config(header, options)
    _check_memory(header, config)
    checkpoint = GgufCheckpoint(header)
    if not is_wholly_checked(checkpoint):
        from albor_serve.trial import try_in_child

        try_in_child(checkpoint, report)
    opened = open_backend(
        checkpoint,
        config.num_slots,
        config.max_seq_len,
        choice=options.backend,
        fallback=options.fallback,
        num_threads=options.num_threads,
        progress=lambda part: report(
            "compiling GPU kernels" if options.backend == "cuda" else "loading", part
        ),
        adapters=options.adapters,
    )
    try:
        tokenizer: Tokenizer = opened.tokenizer
        if folder is not None:
            tokenizer = choose_tokenizer(opened.tokenizer, folder / "tokenizer.json")
        if can_be_cut_at_lines(_metadata_text(header, "tokenizer.ggml.pre") or ""):
            tokenizer = LineMemoTokenizer(tokenizer)
        full_name = _metadata_text(header, "general.name") or ""
        name = (folder or path).name.removesuffix(".gguf")
        template = detect_template(
            tokenizer,
            f"{full_name} {name}",
            _metadata_text(header, "albor.fim.layout"),
        )
        engine = Engine(
            opened.backend,
            tokenizer,
            config,
            lambda b: calibrate(b, budget_ms=CALIBRATION_MS),
            fallback=opened.fallback,
            degraded=opened.degraded,
        )
    except BaseException:
        opened.backend.close()
        if opened.fallback is not None:
            opened.fallback.release()
        raise
    if source is None:
        name = full_name or name
    description = opened.kind
    if options.adapters:
        num = len(options.adapters)
        description += f", {num} LoRA adapter{'s' if num > 1 else ''}"
    return LoadedModel(name, description, engine, template, time.perf_counter() - started)


def needed_bytes(source: Path | None, options: LoadOptions) -> int:
    """Memory that loading a model will take: weights and KV cache. Raises what `load_model` does.

    A folder is converted for it, if it has not been yet.
    """
    path, _ = _resolve(source, lambda _text, _part: None)
    header = open_gguf_header(path)
    return header.num_bytes + _kv_bytes(header, _engine_config(header, options))


def embedded_name() -> str:
    """Name of the model that ships with albor. Raises CheckpointError."""
    path = embedded_path()
    return _metadata_text(open_gguf_header(path), "general.name") or path.stem


def embedded_path() -> Path:
    """The GGUF file that ships with albor.

    Raises:
        CheckpointError: this installation lacks it.
    """
    path = Path(str(resources.files("albor_models") / EMBEDDED_MODEL))
    if not path.is_file():
        raise CheckpointError(
            f"the embedded model {EMBEDDED_MODEL} is not installed: install albor again, or name "
            f"a model"
        )
    return path


def _resolve(source: Path | None, report: Progress) -> tuple[Path, Path | None]:
    """(GGUF file, the folder it was made from or None)."""
    if source is None:
        return embedded_path(), None
    if source.is_dir():
        from albor_serve.convert import cached_gguf

        def converting(done: int, total: int, name: str) -> None:
            report(f"converting {name}", done / total if total else 1.0)

        return cached_gguf(source, "q4_0", converting), source
    if not source.exists():
        raise CheckpointError(
            f"there is no model at {source}: name a .gguf file or a Hugging Face folder"
        )
    return source, None


def _engine_config(header: GgufHeader, options: LoadOptions) -> EngineConfig:
    train_seq_len = _metadata_int(header, "context_length", MAX_DEFAULT_SEQ_LEN)
    max_seq_len = options.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(train_seq_len, MAX_DEFAULT_SEQ_LEN)
    if max_seq_len > train_seq_len:
        raise ConfigError(
            f"--ctx is {max_seq_len}, but this model was made for {train_seq_len} tokens: lower it"
        )
    return EngineConfig(
        num_slots=options.num_slots, max_seq_len=max_seq_len, speculate=options.speculate
    )


def _kv_bytes(header: GgufHeader, config: EngineConfig) -> int:
    layers = _metadata_int(header, "block_count", 0)
    heads = _metadata_int(header, "attention.head_count", 1)
    kv_heads = _metadata_int(header, "attention.head_count_kv", heads)
    width = _metadata_int(header, "embedding_length", 0) // max(heads, 1)
    head_dim = _metadata_int(header, "attention.key_length", width)
    num_tokens = config.num_slots * config.max_seq_len
    return 2 * 2 * layers * kv_heads * head_dim * num_tokens


def _check_memory(header: GgufHeader, config: EngineConfig) -> None:
    """Refuse what would drive the machine into swap or the kernel into killing processes."""
    kv_bytes = _kv_bytes(header, config)
    needed = header.num_bytes + kv_bytes
    available = _available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"the model needs about {needed / 1e9:.1f} GB ({header.num_bytes / 1e9:.1f} of "
            f"weights, {kv_bytes / 1e9:.1f} of KV cache), but {available / 1e9:.1f} GB of memory "
            f"are free: lower --ctx or --slots, or take a smaller model"
        )


def _available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _metadata_int(header: GgufHeader, key: str, default: int) -> int:
    """A number of this architecture; per-layer lists count with their largest."""
    try:
        return header.metadata.integer(f"{header.architecture}.{key}", default)
    except CheckpointFormatError:
        return default  # llama.cpp knows more kinds of files than our checks do


def _metadata_text(header: GgufHeader, key: str) -> str | None:
    return header.metadata.string(key) if key in header.metadata else None
