"""Triton where it is installed, and a stand-in that lets the modules import where it is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from albor_serve.errors import BackendError

__all__ = ["HAVE_TRITON", "INTERPRET", "jit", "require_triton", "tl"]

HAVE_TRITON: bool
"""Whether kernels can be compiled or interpreted here."""

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, which has no inline assembly."""

tl: Any
try:
    import triton
    import triton.language

    tl = triton.language

    HAVE_TRITON = True
except ImportError:
    triton = None

    class _Missing:
        """Stands for `triton.language` in the annotations of kernels that will never run."""

        constexpr = int

    tl = _Missing()
    HAVE_TRITON = False


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a function a Triton kernel or device function; without Triton, leave it as it is."""

    def wrap(function: Callable[..., Any]) -> Any:
        return function if triton is None else triton.jit(function, **options)

    return wrap


def require_triton() -> None:
    """Raise BackendError where Triton is not installed."""
    if not HAVE_TRITON:
        raise BackendError(
            "the GPU kernels need Triton, which is not installed: install albor[gpu]"
        )
