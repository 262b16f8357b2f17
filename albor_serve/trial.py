"""Load a file that only llama.cpp understands in a child process first.

llama.cpp meets some damage with an assertion, which would end the server with all its users. Files
of the architectures that albor knows are checked wholly before native code sees them
(checkpoint/preflight.py); any other file is loaded once by a child, which may crash alone. What
came of it is remembered for the file as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Final

import albor_serve
from albor_serve import errors
from albor_serve.checkpoint.gguf import GgufCheckpoint
from albor_serve.convert import cache_folder
from albor_serve.errors import (
    AlborError,
    BackendError,
    CheckpointError,
    CheckpointFormatError,
)

__all__ = ["try_in_child"]

MAX_SEQ_LEN: Final = 64
PROMPT_LEN: Final = 40
BASE_S: Final = 60.0
BYTES_PER_S: Final = 20e6
"""A slow disk: files that take longer are not loaded but read for ever."""
BASE_BYTES: Final = 4 << 30
"""Address space for the interpreter, its libraries and llama.cpp's buffers; measured 1.5 GB."""
MAX_OUTPUT_BYTES: Final = 1 << 24
MAX_REMEMBERED: Final = 256
FAILED: Final = 3
"""Exit status of a child that refused the file in words, on standard output."""
TEXT: Final = "def f(x):\n    return 'é' + x  # <|fim_prefix|>\n"

Report = Callable[[str, float], None]


def try_in_child(checkpoint: GgufCheckpoint, report: Report) -> None:
    """Make sure that loading a file does not end this process.

    Returns at once for those that passed before. Files that albor's own checks vouch for
    (checkpoint/preflight.py) need none of this. `report` is called some times a second meanwhile;
    what it raises ends the child.

    Raises:
        CheckpointFormatError: the child crashed on it or hung.
        BackendError: the child could not be run.
        What loading it raises.
    """
    try:
        parts = [(path, path.stat()) for path in _parts(checkpoint)]
    except OSError as error:
        raise CheckpointError(
            f"cannot read {checkpoint.path} with all its parts: {error.strerror or error}"
        ) from error
    key = _identity(parts)
    known = _Known(cache_folder() / "loaded.json")
    if known.has(key):
        return
    _run_child(checkpoint.path, sum(status.st_size for _, status in parts), report)
    known.add(key)


def _parts(checkpoint: GgufCheckpoint) -> list[Path]:
    """The files of a model, named as llama.cpp finds those of a split one."""
    path = checkpoint.path
    named = re.fullmatch(r"(.*-)00001(-of-(\d{5})\.gguf)", path.name)
    if checkpoint.header.num_splits < 2 or named is None:
        return [path]
    return [path.with_name(f"{named[1]}{i:05}{named[2]}") for i in range(1, int(named[3]) + 1)]


def _identity(parts: list[tuple[Path, os.stat_result]]) -> str:
    """Of the files as they are now, and of the library that reads them."""
    try:
        library = version("llama-cpp-python")
    except PackageNotFoundError:
        library = "unknown"
    files = [
        (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)
        for path, status in parts
    ]
    return hashlib.sha256(repr((library, files)).encode()).hexdigest()[:32]


def _run_child(path: Path, num_bytes: int, report: Report) -> None:
    seconds = BASE_S + num_bytes / BYTES_PER_S
    # The weights once as the file and once in llama.cpp's own order.
    max_bytes = BASE_BYTES + 2 * num_bytes
    # -P: nothing is imported from the folder that the server was started in.
    command = [sys.executable, "-P", "-m", "albor_serve.trial"]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as complaints:
        try:
            child = subprocess.Popen(  # noqa: S603
                [*command, str(path.resolve()), str(max_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=complaints,
                env=_environment(),
            )
        except OSError as error:
            raise BackendError(
                f"{path} must be tried in a process of its own, and none can be started "
                f"({error.strerror or error}): free memory or processes"
            ) from error
        end = time.monotonic() + seconds
        try:
            while (status := _wait(child)) is None:
                report("trying the file in a process of its own", 0.0)
                if time.monotonic() > end:
                    raise CheckpointFormatError(
                        f"{path} was not loaded within {seconds:.0f} s: it is damaged, or this "
                        f"machine is too slow for it"
                    )
        finally:
            child.kill()
            child.wait()
        if status == 0:
            return
        if status == FAILED:
            raise _told(_tail(output), path)
        raise _crashed(status, _tail(complaints).decode("utf-8", "replace"), path)


def _environment() -> dict[str, str]:
    """This process's, in which the child finds the same albor and crashes without a debugger."""
    here = str(Path(albor_serve.__file__).resolve().parent.parent)
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
        "GGML_NO_BACKTRACE": "1",
    }


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(0.1)
    except subprocess.TimeoutExpired:
        return None


def _tail(file: IO[bytes]) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4096))
    return file.read()


def _crashed(status: int, complaints: str, path: Path) -> AlborError:
    if status > 0:
        # The interpreter's own end, not llama.cpp's: this says nothing of the file.
        lines = [line.strip() for line in complaints.splitlines() if line.strip()]
        last = lines[-1][:200] if lines else f"exit status {status}"
        return BackendError(f"{path} could not be tried in a process of its own: {last}")
    try:
        how = signal.Signals(-status).name
    except ValueError:
        how = f"signal {-status}"
    if status == -signal.SIGKILL:
        return BackendError(
            f"{path}: the process that tried to load this file was killed, as systems do when "
            f"memory runs out: free some, or take a smaller model"
        )
    found = re.search(r"(GGML_ASSERT\(.*\)) failed", complaints)
    if found is not None:
        how += f", {found[1][:200]}"
    return CheckpointFormatError(
        f"{path}: llama.cpp crashes when it loads this file ({how}): download or convert it again"
    )


def _told(output: bytes, path: Path) -> AlborError:
    """The child's own words."""
    try:
        said: Any = json.loads(output)
        kind, message = getattr(errors, str(said["kind"])), str(said["message"])[:600]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
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
        except (OSError, ValueError, RecursionError):
            return []
        return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []

    def has(self, key: str) -> bool:
        return key in self._read()

    def add(self, key: str) -> None:
        keys = [*self._read(), key][-MAX_REMEMBERED:]
        name = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=".loaded-", delete=False
            ) as file:
                name = Path(file.name)
                json.dump(keys, file)
            name.replace(self._path)
        except OSError:
            # A read-only home or a full disk: the file is tried again next time.
            if name is not None:
                with contextlib.suppress(OSError):
                    name.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """The child: load the file, read its vocabulary, compute a prompt and a token, and say in
    words what is wrong with it.

    `arguments` are the file and the bytes of address space that this may take.
    """
    path, max_bytes = arguments
    _limit(int(max_bytes))
    from albor_serve.backends.base import ExtendStep
    from albor_serve.backends.llamacpp import LlamaCppBackend

    try:
        backend = LlamaCppBackend.load(path, 1, MAX_SEQ_LEN, num_threads=1)
        try:
            tokenizer = backend.tokenizer
            last = tokenizer.vocab_size - 1
            tokenizer.token_bytes(last)  # reads the whole vocabulary
            prompt = [*tokenizer.encode(TEXT, parse_special=True), 0, last][-PROMPT_LEN:]
            backend.extend([ExtendStep(0, tuple(prompt), "last")])
            backend.extend([ExtendStep(0, (last,), "last")])
        finally:
            backend.close()
    except (AlborError, MemoryError) as error:
        kind, message = type(error).__name__, str(error)
        if isinstance(error, MemoryError):
            kind = CheckpointError.__name__
            message = f"{path} takes far more memory than its size: download or convert it again"
        sys.stdout.write(json.dumps({"kind": kind, "message": message}))
        sys.stdout.flush()
        return FAILED
    return 0


def _limit(max_bytes: int) -> None:
    """No core file, no flood of output, no more memory than such a file can need."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES),
        (resource.RLIMIT_AS, max_bytes),
    ):
        # Some systems know a limit but do not set it; a stricter one of the user's stays.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (limit, limit))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
