"""What surrounds llama.cpp's native library: its log, its CPU check, the C functions lent to it."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import re
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

from albor_serve.errors import BackendError

__all__ = [
    "NativeAbortFlag",
    "available_memory_bytes",
    "check_cpu_features",
    "last_log_errors",
    "load_library",
    "num_physical_cores",
]

_MAX_LOG_LINES = 8
_LOG_LEVEL_ERROR = 4  # ggml.h; the package's own table is of an older release
_LOG_LEVEL_CONTINUE = 5

REBUILD_REMEDY = (
    "build it for this one: pip install --force-reinstall --no-cache-dir --no-binary :all: "
    "llama-cpp-python"
)


class _LogTail:
    """Keeps the last error lines of llama.cpp's log and drops everything else.

    llama.cpp has one log for the whole process and calls it from any of its threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=_MAX_LOG_LINES)
        self._last_was_error = False

    def write(self, level: int, text: bytes | None, _data: object) -> None:
        """llama_log_callback: take one event, which may be a part of a line."""
        if level == _LOG_LEVEL_CONTINUE:
            if not self._last_was_error:
                return
        else:
            self._last_was_error = level == _LOG_LEVEL_ERROR
            if not self._last_was_error:
                return
        line = (text or b"").decode("utf-8", "replace")
        line = re.sub(r"^\w+: ", "", " ".join(line.split()))  # the name of a C++ function
        if line:
            with self._lock:
                self._lines.append(line)

    def take(self) -> str:
        """The error lines since the last call as one line of text, oldest first."""
        with self._lock:
            lines = list(self._lines)
            self._lines.clear()
        return "; ".join(dict.fromkeys(lines))


def c_library() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)


@functools.cache
def _library_and_log() -> tuple[Any, _LogTail, Any]:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"llama-cpp-python cannot be loaded ({_one_line(error)}): install it again, or "
            f"{REBUILD_REMEDY}"
        ) from error
    log = _LogTail()
    # The result is cached, so that the callback lives as long as llama.cpp may call it.
    callback = llama_cpp.llama_log_callback(log.write)
    llama_cpp.llama_log_set(callback, None)
    check_cpu_features(llama_cpp.llama_print_system_info().decode("utf-8", "replace"))
    llama_cpp.llama_backend_init()
    # After the interpreter is gone a Python callback would crash the process. abs() takes the
    # log level, ignores the other two arguments and touches nothing.
    silent = ctypes.cast(c_library().abs, llama_cpp.llama_log_callback)
    atexit.register(llama_cpp.llama_log_set, silent, None)
    return llama_cpp, log, callback


def load_library() -> Any:
    """The llama_cpp module, its log silenced, on a CPU that can run it.

    Raises:
        BackendError: the package is missing or damaged, or was compiled for another CPU.
    """
    return _library_and_log()[0]


def last_log_errors() -> str:
    """What llama.cpp has complained about since the last call, on one line; "" for nothing."""
    return _library_and_log()[1].take()


_CPU_FLAGS = {
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "AVX": "avx",
    "AVX_VNNI": "avx_vnni",
    "AVX2": "avx2",
    "F16C": "f16c",
    "FMA": "fma",
    "BMI2": "bmi2",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "NEON": "asimd",
    "DOTPROD": "asimddp",
    "FP16_VA": "asimdhp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
    "SME": "sme",
}
"""llama.cpp's names of CPU features, and Linux's."""


def check_cpu_features(system_info: str, cpuinfo: str | None = None) -> None:
    """Refuse a native library that was compiled for a CPU with more features than this one.

    A wheel cached on another machine would otherwise end the process with SIGILL at the first
    matrix product.

    Args:
        system_info: what llama_print_system_info says, such as "CPU : AVX2 = 1 | FMA = 1 | ".
        cpuinfo: text of /proc/cpuinfo; None reads it. Without that file nothing is checked.

    Raises:
        BackendError: with the missing features and the remedy.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    if found is None:
        return
    flags = set(found.group(1).split())
    used = re.findall(r"(\w+) = 1\b", system_info)
    missing = [name for name in used if name in _CPU_FLAGS and _CPU_FLAGS[name] not in flags]
    if missing:
        raise BackendError(
            f"the installed llama-cpp-python needs {', '.join(missing)}, which this CPU lacks: "
            f"{REBUILD_REMEDY}"
        )


def num_physical_cores() -> int:
    """Physical cores that this process may use: its CPU affinity, its cgroup's quota, no siblings.

    llama.cpp's threads spin at barriers, so one thread more than there are cores costs far more
    than one fewer.
    """
    if not hasattr(os, "sched_getaffinity"):
        return max(1, os.cpu_count() or 1)
    cpus = os.sched_getaffinity(0)
    cores = set()
    for cpu in cpus:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), _cgroup_cpus() or len(cores)))


def _cgroup_cpus() -> int | None:
    """Whole CPUs that cgroup v2 grants to this process, or None for no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def available_memory_bytes() -> int | None:
    """Memory that this process may still take: the system's and its cgroup's; None if unknown."""
    found: list[int] = []
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
        match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE)
        if match:
            found.append(int(match.group(1)) * 1024)
        cgroup = Path("/sys/fs/cgroup")
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, min(found)) if found else None


class NativeAbortFlag:
    """An AbortFlag that llama.cpp reads between graph nodes without entering Python.

    llama.cpp asks `bool (*)(void * data)` whether to stop. A Python function there would take the
    interpreter's lock after each of some hundred nodes a token, and wait for it whenever another
    thread works. The C library's strlen has the same calling convention: with `data` pointing at
    a two-byte buffer it returns 0 (go on) while the first byte is 0, and 1 (stop) once it is 1.
    Writing one byte is atomic, so `set` needs no lock.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self._strlen = c_library().strlen

    def set(self) -> None:
        """Ask the call in flight to stop. Safe from any thread, any number of times."""
        self._buffer[0] = b"\x01"

    def clear(self) -> None:
        """Forget an earlier `set`. Only the thread that calls `extend` may do this."""
        self._buffer[0] = b"\x00"

    def is_set(self) -> bool:
        """Whether the next graph node will stop."""
        return self._buffer[0] == b"\x01"

    def install(self, llama_cpp: Any, context: Any) -> None:
        """Make `context` obey this flag. The flag must outlive the context."""
        llama_cpp.llama_set_abort_callback(
            context,
            ctypes.cast(self._strlen, llama_cpp.ggml_abort_callback),
            ctypes.cast(self._buffer, ctypes.c_void_p),
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
