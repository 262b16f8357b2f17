"""Times on a GPU, and the bandwidth that bounds them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from albor_serve.bench.gpu_rows import GpuRow

__all__ = ["Put", "attempt", "describe_gpu", "device_us", "host_us", "read_bandwidth"]

Put = Callable[[GpuRow], None]
"""Takes a row as soon as it is there."""
WARM_UP: Final = 3
_BUFFER_BYTES: Final = 2 << 30


def device_us(run: Callable[[], object], repeats: int, before: Callable[[], object]) -> float:
    """Median time in µs that the GPU takes for `run`; `before` is called, untimed, each time."""
    times: list[float] = []
    for at in range(WARM_UP + repeats):
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        if at >= WARM_UP:
            times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)


def host_us(run: Callable[[], object], repeats: int, before: Callable[[], object]) -> float:
    """Median time in µs until `run` returns, by the host's clock; `before` is not timed."""
    times: list[float] = []
    for at in range(WARM_UP + repeats):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if at >= WARM_UP:
            times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times)


def attempt(put: Put, row: Callable[[], GpuRow], failed: GpuRow) -> None:
    """Hand over what `row` gives, or `failed` with the reason."""
    try:
        done = row()
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is that row's result
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        done = GpuRow(
            failed.engine, failed.what, failed.context, failed.batch, failed.rows, note=reason
        )
    put(done)


def read_bandwidth() -> float:
    """Bytes per second: the best of reading 2 GiB (a sum) and of copying them (both ways)."""
    source = torch.ones(_BUFFER_BYTES // 4, device="cuda")
    target = torch.empty_like(source)

    def nothing() -> None:
        return None

    read = _BUFFER_BYTES / device_us(source.sum, 10, nothing)
    copied = 2 * _BUFFER_BYTES / device_us(lambda: target.copy_(source), 10, nothing)
    best: float = max(read, copied)
    return best * 1e6


def describe_gpu() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "num_multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "bytes_per_s": read_bandwidth(),
    }
