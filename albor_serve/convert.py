"""Checkpoint to GGUF, on request or once behind the scenes.

`convert` is the command; `cached_gguf` is what serving a Hugging Face folder on CPU goes through.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from albor_serve.checkpoint import open_checkpoint, open_gguf_header
from albor_serve.checkpoint.hf import weight_files
from albor_serve.checkpoint.writer import Progress, QuantName, TensorReport, write_gguf
from albor_serve.errors import AlborError, CheckpointError
from albor_serve.quant import FloatArray

__all__ = ["ConvertReport", "cache_folder", "cached_gguf", "convert"]

_FORMAT_REVISION: Final = 1
"""Raise when the same checkpoint would give a different file, so that caches are made anew."""

_SIDE_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_READ_BYTES: Final = 1 << 22
_CARD_BYTES: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion made."""

    src: Path
    out: Path
    quant: QuantName
    out_bytes: int
    seconds: float
    tensors: tuple[TensorReport, ...]

    @property
    def num_weights(self) -> int:
        """Weights in the model."""
        return sum(tensor.num_weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Size of the whole file, vocabulary included, for each weight."""
        return 8 * self.out_bytes / self.num_weights

    @property
    def relative_error(self) -> float:
        """Root mean square of the matrices' relative errors, weighted by their sizes."""
        matrices = [tensor for tensor in self.tensors if tensor.relative_error > 0]
        total = sum(tensor.num_weights for tensor in matrices)
        if not total:
            return 0.0
        square = sum(tensor.num_weights * tensor.relative_error**2 for tensor in matrices)
        return math.sqrt(square / total)


def convert(
    src: Path,
    out: Path,
    quant: QuantName = "q4_0",
    progress: Progress | None = None,
    *,
    importance: Mapping[str, FloatArray] | None = None,
    general: Mapping[str, str] | None = None,
) -> ConvertReport:
    """Write the checkpoint `src` (a folder or a .gguf file) as the GGUF file `out`.

    The licence named at the top of the folder's README.md is carried over. The remaining
    arguments and the errors are those of writer.write_gguf. A failure leaves nothing behind.
    """
    began = time.perf_counter()
    checkpoint = open_checkpoint(src)
    tokenizer: Path | None = None
    metadata = dict(general or {})
    if checkpoint.format == "hf":
        tokenizer = src / "tokenizer.json"
        if not tokenizer.is_file():
            raise CheckpointError(f"{src} has no tokenizer.json: download it as well")
        licence = _licence(src / "README.md")
        if licence is not None:
            metadata.setdefault("license", licence)
    elif out.exists() and out.samefile(src):
        raise CheckpointError(f"{out} is the source itself: give another name")
    tensors = write_gguf(
        checkpoint, tokenizer, out, quant, progress, importance=importance, general=metadata
    )
    seconds = time.perf_counter() - began
    return ConvertReport(src, out, quant, out.stat().st_size, seconds, tensors)


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/albor/gguf, or ~/.cache/albor/gguf."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "albor" / "gguf"


def cached_gguf(
    src_folder: Path,
    quant: QuantName = "q4_0",
    progress: Progress | None = None,
    *,
    folder: Path | None = None,
) -> Path:
    """The GGUF file of a checkpoint folder, made on first use.

    Its name is a hash of the weights, the config and the tokenizer, so that a changed checkpoint
    gives a new file and a copied one does not. The hash is remembered by path, size and time of
    change: a later start reads no weights. Several processes may call this at once; on POSIX the
    first one converts and the others wait for it.

    Args:
        src_folder: the Hugging Face folder.
        quant: format of the matrices.
        progress: told about the conversion, if there is one.
        folder: the cache; None takes cache_folder().

    Raises what `convert` raises; CheckpointError also where the cache cannot be written.
    """
    cache = cache_folder() if folder is None else folder
    sources = _source_files(src_folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        digest = _content_hash(src_folder, sources, quant, cache)
        out = cache / f"{digest}.gguf"
        if _is_sound(out):
            return out
        with _locked(cache / f"{digest}.lock"):
            if not _is_sound(out):  # another process may have made it meanwhile
                for stale in cache.glob(f".{out.name}.*.tmp"):
                    stale.unlink(missing_ok=True)
                convert(src_folder, out, quant, progress)
    except OSError as error:
        raise CheckpointError(
            f"the cache {cache} cannot be used ({error.strerror or error}): set XDG_CACHE_HOME to "
            f"a folder that can be written, or convert the model with albor-serve convert"
        ) from error
    return out


def _source_files(folder: Path) -> tuple[Path, ...]:
    side = (folder / name for name in _SIDE_FILES)
    return (*(path for path in side if path.is_file()), *weight_files(folder))


def _content_hash(src: Path, sources: tuple[Path, ...], quant: str, cache: Path) -> str:
    """Hash of names and contents of the sources, from memory where they have not changed."""
    stats = [path.stat() for path in sources]
    facts = {
        "files": [
            [path.name, stat.st_size, stat.st_mtime_ns]
            for path, stat in zip(sources, stats, strict=True)
        ],
    }
    key = hashlib.blake2b(os.fsencode(src.resolve()), digest_size=16).hexdigest()
    memo = cache / f"{key}.json"
    known = _read_memo(memo)
    content = known.get("content")
    if known.get("files") != facts["files"] or not isinstance(content, str):
        whole = hashlib.blake2b(digest_size=20)
        for path, stat in zip(sources, stats, strict=True):
            whole.update(f"{path.name}\0{stat.st_size}\0".encode())
            with path.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    whole.update(data)
        content = whole.hexdigest()
        temporary = memo.with_name(f".{memo.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_text(json.dumps({**facts, "content": content}), encoding="utf-8")
            temporary.replace(memo)
        finally:
            temporary.unlink(missing_ok=True)
    salt = f"{content}\0{quant}\0{_FORMAT_REVISION}".encode()
    return hashlib.blake2b(salt, digest_size=20).hexdigest()


def _read_memo(path: Path) -> dict[str, Any]:
    """What an earlier start noted; anything unreadable counts as nothing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_sound(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        open_gguf_header(path)
    except AlborError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock. Without fcntl (Windows) there is none: two processes may then do the
    same work, and the second rename wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file lets go
        yield


def _licence(card: Path) -> str | None:
    """The licence in the front matter of a model card, as an SPDX-like id."""
    try:
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_CARD_BYTES)
    except OSError:
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    found = front and re.search(r"^license:\s*([\w.+-]+)\s*$", front.group(1), re.MULTILINE)
    return found.group(1) if found else None
