"""The machine that a benchmark ran on, and the memory bandwidth that bounds it."""

from __future__ import annotations

import platform
import re
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from albor_serve.backends.llamacpp_native import load_library, num_physical_cores

__all__ = ["Machine", "describe_machine", "read_bandwidth"]

DRAM_BYTES = 1 << 30
"""Buffer that no cache holds."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a reader needs to judge a figure."""

    cpu: str
    num_cores: int
    memory_gb: float
    system: str
    cpu_features: str
    """The instruction sets that our llama.cpp was compiled for."""
    dram_gb_per_s: float
    """Measured read bandwidth from memory, all cores together."""
    commit: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe_machine() -> Machine:
    """Measure and read; takes about a second."""
    cores = num_physical_cores()
    features = load_library().llama_print_system_info().decode()
    return Machine(
        cpu=_cpu_name(),
        num_cores=cores,
        memory_gb=_memory_bytes() / 1e9,
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        cpu_features=" ".join(re.findall(r"(\w+) = 1", features)),
        dram_gb_per_s=read_bandwidth(DRAM_BYTES, cores) / 1e9,
        commit=_commit(),
    )


def read_bandwidth(num_bytes: int, num_threads: int, seconds: float = 0.5) -> float:
    """Bytes per second at which `num_threads` threads together read a buffer again and again.

    A buffer of a model's size that fits into the cache is read faster than memory: that, not the
    memory's bandwidth, is then the limit for decoding.
    """
    part = max(num_bytes // num_threads // 8, 1)
    parts = [np.ones(part, dtype=np.int64) for _ in range(num_threads)]
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        threads = [threading.Thread(target=np.bitwise_or.reduce, args=(a,)) for a in parts]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, num_threads * part * 8 / (time.perf_counter() - started))
    return best


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        found = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else 0


def _commit() -> str:
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607 - git of the person's PATH
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
