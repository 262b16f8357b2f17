"""Which errors of torch, Triton and CUDA mean what."""

from __future__ import annotations

import pytest

from albor_serve.backends.device_errors import device_error
from albor_serve.errors import DeviceError, DeviceLostError, DeviceMemoryError


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class AcceleratorError(RuntimeError):
    """Named as torch's."""


class OutOfResources(Exception):  # noqa: N818 - named as Triton's
    __module__ = "triton.runtime.errors"


def works() -> None:
    return None


def fails() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), DeviceMemoryError),
        (RuntimeError("CUDA error: out of memory"), DeviceMemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), DeviceMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), DeviceMemoryError),
        (OutOfResources("out of resource: shared memory, Required: 262144"), DeviceError),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), DeviceError),
        (AcceleratorError("no kernel image is available for execution"), DeviceError),
    ],
)
def test_a_device_that_works_on_is_not_lost(error: Exception, kind: type[Exception]) -> None:
    assert type(device_error(error, works)) is kind
    found = device_error(error, fails)
    assert type(found) is DeviceLostError
    assert str(error)[:40] in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be\n",
        "Triton Error [CUDA]: unspecified launch failure",
        "CUDA error: device-side assert triggered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    ],
)
def test_a_sticky_fault_is_one_line_with_a_remedy(text: str) -> None:
    found = device_error(RuntimeError(text), fails)
    assert isinstance(found, DeviceLostError)
    assert "\n" not in str(found)
    assert "--fallback cpu" in str(found)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape [1] is invalid"), TypeError("CUDA"), KeyboardInterrupt()]
)
def test_other_errors_are_left_to_others(error: BaseException) -> None:
    assert device_error(error, fails) is None
