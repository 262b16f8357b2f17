"""Files of unknown origin: opened only if regular, read only up to a limit."""

from __future__ import annotations

import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any

from albor_serve.errors import CheckpointError, CheckpointFormatError

__all__ = ["map_file", "parse_json_object", "read_json_object"]


def map_file(path: Path, min_bytes: int) -> mmap.mmap:
    """Map a file read-only.

    The map lives as long as anything refers to it. Another process that shortens the file
    meanwhile can crash this one, as with every mapped model file.

    Raises:
        CheckpointError: the file is absent, not a regular file, or not readable.
        CheckpointFormatError: it has fewer than `min_bytes` bytes (at least 1).
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size < min_bytes:
                raise CheckpointFormatError(
                    f"{path} has {size} bytes, too few for a model file: download it again"
                )
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: the file is absent, not a regular file, or not readable.
        CheckpointFormatError: it is larger than `max_bytes` or not a JSON object.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    if len(data) > max_bytes:
        raise CheckpointFormatError(
            f"{path} is larger than {max_bytes} bytes, the limit for such a file: download it again"
        )
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object without duplicate keys; `what` names it in errors.

    Raises CheckpointFormatError for anything else.
    """
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, UTF-8 and huge numbers
        raise CheckpointFormatError(
            f"{what} is not valid JSON ({_reason(error)}): download the model again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointFormatError(
            f"{what} holds a JSON {type(value).__name__}, not an object: download the model again"
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} occurs twice")
            seen.add(key)
    return result


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file only: opening a pipe would wait for a writer for ever."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return descriptor


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
