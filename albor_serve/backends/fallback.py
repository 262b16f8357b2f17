"""What an engine goes on with when its device fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from albor_serve.backends.base import Backend

__all__ = ["Fallback"]


@dataclass(frozen=True, slots=True)
class Fallback:
    """A second way to compute the same model, and what both ways share."""

    name: str
    """For people, such as "the CPU"."""
    open: Callable[[], Backend]
    """Loads the model again, with as many slots of the same length; raises AlborError."""
    release: Callable[[], None]
    """Frees what outlives the first backend, such as its tokenizer; called once, at the end."""
