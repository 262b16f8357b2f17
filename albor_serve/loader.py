"""From what a person names to a running model: embedded, GGUF file or Hugging Face folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from albor_serve.backends.base import Backend
from albor_serve.backends.calibrate import calibrate
from albor_serve.backends.cpu import CpuBackend, unsupported
from albor_serve.backends.llamacpp import LlamaCppBackend, LlamaCppVocabulary
from albor_serve.backends.llamacpp_tokenizer import LlamaCppTokenizer, choose_tokenizer
from albor_serve.checkpoint import GgufCheckpoint
from albor_serve.checkpoint.gguf_header import GgufHeader, open_gguf_header
from albor_serve.checkpoint.preflight import check_for_native
from albor_serve.config import EngineConfig
from albor_serve.engine import Engine
from albor_serve.errors import CheckpointError, CheckpointFormatError, ConfigError
from albor_serve.fim import FimTemplate, detect_template
from albor_serve.kernels.cpu_decode import best_instruction_set
from albor_serve.tokenizer import Tokenizer

__all__ = [
    "EMBEDDED_MODEL",
    "BackendChoice",
    "LoadOptions",
    "LoadedModel",
    "OpenBackend",
    "load_model",
    "open_backend",
]

EMBEDDED_MODEL = "albor-33m-q4_0.gguf"
MAX_DEFAULT_SEQ_LEN = 4096
"""Models made for 128k tokens would take gigabytes of KV cache: more is for --ctx to ask for."""
CALIBRATION_MS = 150.0

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of it is, 0.0 to 1.0."""


BackendChoice = Literal["auto", "cpu", "llamacpp"]
"""Who computes: albor's own CPU kernels, llama.cpp, or the first where it can."""


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


@dataclass(frozen=True, slots=True)
class OpenBackend:
    """A backend, the tokenizer inside its file, and what the file is."""

    backend: Backend
    tokenizer: LlamaCppTokenizer
    """It lives as long as the backend is open."""
    kind: str
    """Architecture, size and format, for people."""


def open_backend(
    checkpoint: GgufCheckpoint,
    num_slots: int,
    max_seq_len: int,
    *,
    choice: BackendChoice = "auto",
    num_threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> OpenBackend:
    """Load a GGUF file into the backend that runs it fastest here.

    Raises:
        ConfigError: `choice` is "cpu" and albor's kernels can't run this model here.
        What LlamaCppBackend.load and CpuBackend raise.
    """
    path = checkpoint.path
    # The kernels for AVX2 and AVX-VNNI do not beat llama.cpp yet: they are for who asks.
    if choice == "cpu" or (choice == "auto" and best_instruction_set() == "avx512"):
        reason = unsupported(checkpoint)
        if reason is None:
            return _open_own(checkpoint, num_slots, max_seq_len, num_threads, progress)
        if choice == "cpu":
            raise ConfigError(
                f"albor's CPU kernels can't run {path.name}: {reason}; leave out --backend cpu"
            )
    native = LlamaCppBackend.load(
        path, num_slots, max_seq_len, num_threads=num_threads, progress=progress
    )
    info = native.model_info
    # llama.cpp prints "?B" for sizes that it has no name for.
    kind = f"{info.description.replace('?B ', '')}, {info.num_parameters / 1e6:.0f}M parameters"
    return OpenBackend(native, native.tokenizer, kind)


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
    train_seq_len = _metadata_int(header, "context_length", MAX_DEFAULT_SEQ_LEN)
    max_seq_len = options.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(train_seq_len, MAX_DEFAULT_SEQ_LEN)
    if max_seq_len > train_seq_len:
        raise ConfigError(
            f"--ctx is {max_seq_len}, but this model was made for {train_seq_len} tokens: lower it"
        )
    config = EngineConfig(
        num_slots=options.num_slots, max_seq_len=max_seq_len, speculate=options.speculate
    )
    _check_memory(header, config)
    opened = open_backend(
        GgufCheckpoint(header),
        config.num_slots,
        config.max_seq_len,
        choice=options.backend,
        num_threads=options.num_threads,
        progress=lambda part: report("loading", part),
    )
    try:
        tokenizer: Tokenizer = opened.tokenizer
        if folder is not None:
            tokenizer = choose_tokenizer(opened.tokenizer, folder / "tokenizer.json")
        full_name = _metadata_text(header, "general.name") or ""
        name = (folder or path).name.removesuffix(".gguf")
        template = detect_template(
            tokenizer,
            f"{full_name} {name}",
            _metadata_text(header, "albor.fim.layout"),
        )
        engine = Engine(
            opened.backend, tokenizer, config, lambda b: calibrate(b, budget_ms=CALIBRATION_MS)
        )
    except BaseException:
        opened.backend.close()
        raise
    if source is None:
        name = full_name or name
    description = opened.kind
    return LoadedModel(name, description, engine, template, time.perf_counter() - started)


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


def _check_memory(header: GgufHeader, config: EngineConfig) -> None:
    """Refuse what would drive the machine into swap or the kernel into killing processes."""
    layers = _metadata_int(header, "block_count", 0)
    heads = _metadata_int(header, "attention.head_count", 1)
    kv_heads = _metadata_int(header, "attention.head_count_kv", heads)
    width = _metadata_int(header, "embedding_length", 0) // max(heads, 1)
    head_dim = _metadata_int(header, "attention.key_length", width)
    num_tokens = config.num_slots * config.max_seq_len
    kv_bytes = 2 * 2 * layers * kv_heads * head_dim * num_tokens
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
