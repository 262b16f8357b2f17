"""One process of a `KernelBuild`: compiles what its standard input asks for, without a GPU.

Usage: python -m albor_serve.kernels.build_worker cuda 90 32        (kind, capability, warp size)

Each line of its input is [module, name, specialization, is it for later], as JSON; it answers with
"done" or "failed" on a line of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["main"]


class _Target:
    """Triton's driver, as far as compiling needs one."""

    def __init__(self, kind: str, capability: int, warp_size: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(kind, capability, warp_size)

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Kernels are kept by device; there is only one here."""
        return 0


def main(arguments: list[str], orders: Iterable[str]) -> None:
    """Compile until the input ends."""
    from triton.runtime import driver

    from albor_serve.kernels.build import fix_hashes

    kind, capability, warp_size = arguments
    driver.set_active(_Target(kind, int(capability), int(warp_size)))
    # Kernels must not write to the pipe by accident.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fix_hashes()
    is_patient = False
    for line in orders:
        module, name, specialization, is_for_later = json.loads(line)
        if is_for_later and not is_patient:
            is_patient = True
            os.nice(10)
        try:
            kernel = getattr(importlib.import_module(module), name).preload(specialization)
            _build_launcher(kernel)
        except Exception:  # noqa: BLE001 - it is reported where the kernel is launched
            print("failed", file=answers, flush=True)
        else:
            print("done", file=answers, flush=True)


def _build_launcher(kernel: Any) -> None:
    """Compile the C function that calls the kernel, for which a machine needs CUDA's library."""
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)


if __name__ == "__main__":
    main(sys.argv[1:], sys.stdin)
