"""Load a file that only llama.cpp understands in a child process first.

llama.cpp meets some damage with an assertion, which would end the server with all its users. Files
of the architectures that albor knows are checked wholly before native code sees them
(checkpoint/preflight.py); any other file is loaded once by a child, which may crash alone. What
came of it is remembered for the file as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from albor_serve import errors
from albor_serve.checkpoint.gguf import GgufCheckpoint
from albor_serve.convert import cache_folder
from albor_serve.errors import AlborError, CheckpointFormatError, UnsupportedModelError

__all__ = ["try_in_child"]

MAX_SEQ_LEN: Final = 64
BASE_S: Final = 60.0
BYTES_PER_S: Final = 20e6
"""A slow disk: files that take longer are not loaded but read for ever."""
MAX_REMEMBERED: Final = 256
FAILED: Final = 3
"""Exit status of a child that refused the file in words, on standard output."""


def try_in_child(checkpoint: GgufCheckpoint, report: Callable[[str, float], None]) -> None:
    """Make sure that loading a file does not end this process.

    Returns at once for files that albor's own checks vouch for and for those that passed before.

    Raises:
        CheckpointFormatError: the child crashed on it or hung.
        What loading it raises.
    """
    if _is_vouched_for(checkpoint):
        return
    known = _Known(cache_folder() / "loaded.json")
    key = _identity(checkpoint.path)
    if known.has(key):
        return
    report("trying the file in a process of its own", 0.0)
    _run_child(checkpoint.path)
    known.add(key)


def _is_vouched_for(checkpoint: GgufCheckpoint) -> bool:
    try:
        _ = checkpoint.config
    except UnsupportedModelError:
        return False
    return True


def _identity(path: Path) -> str:
    """Of the file as it is now, and of the library that reads it."""
    status = path.stat()
    parts = (
        str(path.resolve()),
        status.st_size,
        status.st_mtime_ns,
        status.st_ino,
        version("llama-cpp-python"),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _run_child(path: Path) -> None:
    seconds = BASE_S + path.stat().st_size / BYTES_PER_S
    # -P: nothing is imported from the folder that the server was started in.
    command = [sys.executable, "-P", "-m", "albor_serve.trial", str(path.resolve())]
    try:
        done = subprocess.run(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointFormatError(
            f"{path} was not loaded within {seconds:.0f} s: it is damaged, or this machine is too "
            f"slow for it"
        ) from None
    if done.returncode == 0:
        return
    if done.returncode == FAILED:
        raise _told(done.stdout, path)
    how = f"exit status {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    raise CheckpointFormatError(
        f"{path}: llama.cpp crashes when it loads this file ({how}): download or convert it again"
    )


def _told(output: bytes, path: Path) -> AlborError:
    """The child's own words."""
    try:
        said: Any = json.loads(output)
        kind, message = getattr(errors, str(said["kind"])), str(said["message"])[:600]
    except (ValueError, LookupError, TypeError, AttributeError):
        return CheckpointFormatError(f"{path} can't be loaded: download or convert it again")
    is_plain = isinstance(kind, type) and issubclass(kind, AlborError)
    try:
        error = kind(message) if is_plain else None
    except TypeError:
        error = None
    return error if isinstance(error, AlborError) else CheckpointFormatError(message)


class _Known:
    """Files that were loaded well, by `_identity`; losing the list only costs time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> list[str]:
        try:
            keys = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return []
        return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []

    def has(self, key: str) -> bool:
        return key in self._read()

    def add(self, key: str) -> None:
        keys = [*self._read(), key][-MAX_REMEMBERED:]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=".loaded-", delete=False
            ) as file:
                json.dump(keys, file)
            Path(file.name).replace(self._path)
        except OSError:
            return  # a read-only home: the file is tried again next time


def main(arguments: list[str]) -> int:
    """The child: load the file, compute two tokens, say in words what is wrong with it."""
    from albor_serve.backends.base import ExtendStep
    from albor_serve.backends.llamacpp import LlamaCppBackend

    # A crash is expected here: no core file of the model's size, please.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        backend = LlamaCppBackend.load(arguments[0], 1, MAX_SEQ_LEN, num_threads=1)
        try:
            backend.extend([ExtendStep(0, (0,), "last")])
            backend.extend([ExtendStep(0, (0,), "last")])
        finally:
            backend.close()
    except AlborError as error:
        sys.stdout.write(json.dumps({"kind": type(error).__name__, "message": str(error)}))
        sys.stdout.flush()
        return FAILED
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
