"""What torch, Triton and CUDA raise, as albor's errors.

CUDA reports a fault in a kernel at some later call, and then at every call until the process ends
(CUDA Runtime API, "Error Handling"; such errors are called sticky). Others, such as a launch that
asks for too much shared memory, leave the device as it was. The texts do not tell them apart, so
the device itself is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from albor_serve.errors import AlborError, DeviceError, DeviceLostError, DeviceMemoryError

__all__ = ["device_error", "lost", "without_memory"]

_MEMORY: Final = re.compile(r"out of memory|ALLOC_FAILED|MemoryAllocation", re.IGNORECASE)
_DEVICE: Final = re.compile(
    r"\bCUDA\b|cuBLAS|cuDNN|Triton|NVRTC|device-side assert|illegal (memory )?address",
    re.IGNORECASE,
)


def device_error(error: BaseException, probe: Callable[[], None]) -> AlborError | None:
    """The typed error for what a call of the GPU raised; None if it has nothing to do with a GPU.

    Args:
        error: what was raised.
        probe: makes the device finish what it has; raises if the device has failed.
    """
    if not isinstance(error, Exception):
        return None
    text = " ".join(str(error).split())
    kind = type(error)
    if kind.__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and _MEMORY.search(text)
    ):
        # An allocation that fails may also be the first call that hears of a fault.
        return lost(text) if _fails(probe) else without_memory()
    if kind.__module__.partition(".")[0] == "triton":
        # A kernel that does not compile or asks for more than the device has.
        return lost(text) if _fails(probe) else _refused(f"{kind.__name__}: {text}")
    if not isinstance(error, RuntimeError):
        return None
    if kind.__name__ == "AcceleratorError" or _DEVICE.search(text):
        return lost(text) if _fails(probe) else _refused(text)
    return None


def lost(reason: str) -> DeviceLostError:
    """The device has failed for good."""
    return DeviceLostError(
        f"the GPU failed: {reason[:200].rstrip('.')}; start the server again, or use --fallback "
        "cpu or --backend cpu"
    )


def without_memory() -> DeviceMemoryError:
    """The device has no memory left."""
    return DeviceMemoryError(
        "the GPU is out of memory: lower --slots or --ctx, or close what else uses it"
    )


def _refused(reason: str) -> DeviceError:
    return DeviceError(
        f"the GPU refused to compute: {reason[:200].rstrip('.')}; use --fallback cpu or "
        "--backend cpu"
    )


def _fails(probe: Callable[[], None]) -> bool:
    try:
        probe()
    except Exception:  # noqa: BLE001 - whatever it raises, the device does not answer
        return True
    return False
