"""The protocol between the engine and whatever computes logits.

Token ids in, logits out. A backend owns `num_slots` KV caches ("slots"). It knows nothing of
text, requests or HTTP. One thread at a time may call it; `AbortFlag.set` alone may come from any
thread.

Invariants, tested on every backend:
  - the logits of `extend` in one call equal those of the same tokens in many calls;
  - `rewind` and then `extend` equals a fresh cache;
  - after an abort the slot's cache is valid up to `length(slot)` and can be used again;
  - two slots never see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from albor_serve.config import DevicePlan

__all__ = [
    "AbortFlag",
    "Aborted",
    "Backend",
    "BackendInfo",
    "DeviceDecoder",
    "DevicePlan",
    "ExtendStep",
    "LogitRows",
    "LogitsFor",
]

LogitsFor = Literal["none", "last", "all"]
LogitRows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a loaded backend is; fixed for its life."""

    name: str
    """"cpu", "llamacpp", "torch_ref" or "cuda"."""
    device: str
    """For people, such as "cpu (2 threads)"."""
    vocab_size: int
    num_slots: int
    max_seq_len: int
    """Tokens each slot can hold."""
    max_batch_len: int
    """Most tokens in one `extend` call, over all its steps."""
    weight_bytes: int
    """Bytes of weights that one decode step reads."""
    kv_bytes_per_token: int
    """Bytes of KV cache that one token of one slot takes."""


@dataclass(frozen=True, slots=True)
class ExtendStep:
    """Tokens to append to one slot's cache.

    `logits_for` says which rows of logits come back: none, the last token's, or one for every
    token. Row i predicts the token that follows tokens[i].
    """

    slot: int
    tokens: Sequence[int]
    logits_for: LogitsFor = "last"

    @property
    def num_rows(self) -> int:
        """Rows of logits that this step asks for."""
        return {"none": 0, "last": min(1, len(self.tokens)), "all": len(self.tokens)}[
            self.logits_for
        ]


class AbortFlag(Protocol):
    """Stops the `extend` call in flight; the backend sees it between graph nodes."""

    def set(self) -> None:
        """Ask the call in flight to stop. Safe from any thread, any number of times."""

    def clear(self) -> None:
        """Forget an earlier `set`. Only the thread that calls `extend` may do this."""


class Aborted(Exception):  # noqa: N818 - a control-flow signal like StopIteration, not a failure
    """`extend` stopped because the abort flag was set.

    Each slot's cache holds a prefix of what it was asked to hold: read `length(slot)`.
    """


@runtime_checkable
class Backend(Protocol):
    """See the module's text for the rules that every backend keeps."""

    @property
    def info(self) -> BackendInfo:
        """What this backend is."""

    @property
    def abort(self) -> AbortFlag:
        """The flag that stops the call in flight."""

    def extend(self, steps: Sequence[ExtendStep]) -> list[LogitRows]:
        """Append tokens to caches, all steps in one pass, and return logits.

        Each slot may occur once. Steps hold `info.max_batch_len` tokens at most in all. Returns
        one float32 array of shape [step.num_rows, vocab_size] for each step, in order; the arrays
        are the caller's until the next call of any method and must be copied to live longer.

        Raises:
            Aborted: the flag was set. BackendError: the device failed, or a slot would overflow.
        """

    def rewind(self, slot: int, length: int) -> None:
        """Drop the slot's cache beyond its first `length` tokens (0 empties it)."""

    def fork(self, src: int, dst: int, length: int) -> None:
        """Make `dst` hold the first `length` tokens of `src`; what it held before is dropped."""

    def length(self, slot: int) -> int:
        """Tokens that the slot's cache holds."""

    def close(self) -> None:
        """Free native memory. Any later call raises BackendError; closing twice is harmless."""


@runtime_checkable
class DeviceDecoder(Protocol):
    """Optional fast path of a backend that feeds tokens back on the device."""

    def decode(
        self, slot: int, token: int, plan: DevicePlan, on_token: Callable[[int], bool]
    ) -> list[int]:
        """Decode up to plan.max_new_tokens after `token`, which is not in the cache yet.

        `on_token` gets each token as soon as the host sees it and says whether to go on; it runs
        on the caller's thread. The last token is a stop token, the last that the plan allows, or
        the one for which `on_token` said no. The cache then holds `token` and every returned token
        but the last.

        Raises:
            Aborted: the abort flag was set; the cache holds `token` and what `on_token` got, but
                the last of it. BackendError: the device failed, or the slot would overflow.
        """
