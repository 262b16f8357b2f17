"""Kernel launches as values: to run them, or to have their kernels compiled beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Launch"]


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time constants and launch options by name."""

    def run(self) -> None:
        """Queue it. Raises what Triton raises where it can't be compiled or launched."""
        self.kernel[self.grid](*self.arguments, **self.options)
