"""Which slot holds which tokens, and which slot a new prompt should take.

The table mirrors the backend's caches: `Slot.tokens[:Slot.cached_len]` is what the backend holds
for that slot. Choosing well is most of the latency on a CPU: a reused token costs nothing, a
recomputed one 0.5 to 7 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Slot", "SlotChoice", "SlotTable", "common_prefix_len"]

TokenArray = npt.NDArray[np.int32]


def common_prefix_len(a: TokenArray, b: TokenArray) -> int:
    """Number of leading elements in which two int32 arrays agree."""
    size = min(a.size, b.size)
    differs = a[:size] != b[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


@dataclass(slots=True)
class Slot:
    """One KV-cache lane as the engine sees it."""

    index: int
    tokens: TokenArray
    """int32 [max_seq_len]; the first `cached_len` are in the backend's cache."""
    cached_len: int = 0
    is_busy: bool = False
    session: str | None = None
    """Session that used it last; its cache is spared while others are free."""
    last_used_s: float = field(default=float("-inf"))


@dataclass(frozen=True, slots=True)
class SlotChoice:
    """A free slot for a prompt and where its cached prefix comes from."""

    slot: Slot
    reuse_len: int
    """Prompt tokens that need no computing."""
    fork_from: Slot | None = None
    """Copy the first `reuse_len` tokens of this slot first; None: they are in `slot` already."""


class SlotTable:
    """All slots of one backend. Owned by the engine thread."""

    MIN_FORK_GAIN = 64
    """Copying a cache takes milliseconds; it must save at least this many tokens."""
    PROTECT_S = 600.0
    """How long after its last use a session's slot is spared."""

    def __init__(self, num_slots: int, max_seq_len: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.slots = tuple(
            Slot(index, np.zeros(max_seq_len, dtype=np.int32)) for index in range(num_slots)
        )

    def choose(self, prompt: TokenArray, session: str | None, max_reuse: int) -> SlotChoice | None:
        """The free slot that makes `prompt` (int32 [T]) cheapest; None if every slot is busy.

        `max_reuse` caps the reused length: the last prompt token must be computed to get logits.
        Another session's slot is taken over only when nothing else is free, the longest unused
        first; its content is copied instead where that saves enough.
        """
        free = [slot for slot in self.slots if not slot.is_busy]
        if not free:
            return None
        shared = self._shared(prompt[:max_reuse])
        best = min(free, key=lambda slot: self._rank(slot, session, shared[slot.index]))
        source = max(self.slots, key=lambda slot: shared[slot.index])
        gain = shared[source.index] - shared[best.index]
        if source is not best and gain >= self.MIN_FORK_GAIN:
            return SlotChoice(best, shared[source.index], source)
        return SlotChoice(best, shared[best.index])

    def longest(self, prompt: TokenArray) -> tuple[Slot, int]:
        """The slot, busy or free, that holds most of `prompt` (int32 [T]), and how many tokens."""
        shared = self._shared(prompt)
        best = max(self.slots, key=lambda slot: shared[slot.index])
        return best, shared[best.index]

    def _shared(self, prompt: TokenArray) -> list[int]:
        """How many of the first tokens of `prompt` each slot holds."""
        return [common_prefix_len(slot.tokens[: slot.cached_len], prompt) for slot in self.slots]

    def _rank(self, slot: Slot, session: str | None, shared_len: int) -> tuple[float, ...]:
        """Sort key of a free slot, smallest best: own, then unprotected, then protected."""
        if session is not None and slot.session == session:
            return (0,)
        protected = slot.session is not None and self._clock() - slot.last_used_s < self.PROTECT_S
        if protected:
            return (2, slot.last_used_s)
        # The one that saves most; among equals the one whose loss hurts least.
        return (1, -shared_len, slot.cached_len, slot.last_used_s)

    def acquire(self, slot: Slot, session: str | None) -> None:
        """Mark a slot as in use."""
        slot.is_busy = True
        slot.session = session
        slot.last_used_s = self._clock()

    def release(self, slot: Slot) -> None:
        """Mark a slot as free; what it holds stays for the next prompt."""
        slot.is_busy = False
        slot.last_used_s = self._clock()
