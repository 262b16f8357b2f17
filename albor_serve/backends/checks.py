"""What every backend refuses before it touches a cache."""

from __future__ import annotations

from collections.abc import Sequence

from albor_serve.backends.base import BackendInfo, ExtendStep
from albor_serve.errors import BackendError

__all__ = ["check_fork", "check_slot", "check_steps"]


def check_slot(info: BackendInfo, slot: int) -> None:
    """Raise BackendError unless `slot` exists."""
    if not 0 <= slot < info.num_slots:
        raise BackendError(f"there is no slot {slot}: use 0 to {info.num_slots - 1}")


def check_fork(info: BackendInfo, lengths: Sequence[int], src: int, dst: int, length: int) -> None:
    """Raise BackendError unless slot `src` holds the `length` tokens to share with `dst`."""
    check_slot(info, src)
    check_slot(info, dst)
    if not 0 <= length <= lengths[src]:
        raise BackendError(f"cannot share {length} tokens of slot {src}: it holds {lengths[src]}")


def check_steps(info: BackendInfo, lengths: Sequence[int], steps: Sequence[ExtendStep]) -> int:
    """Raise BackendError unless all steps fit into their slots; returns the number of tokens."""
    total = 0
    seen: set[int] = set()
    for step in steps:
        check_slot(info, step.slot)
        if step.slot in seen:
            raise BackendError(f"slot {step.slot} occurs twice in one call: join its tokens")
        seen.add(step.slot)
        total += len(step.tokens)
        length = lengths[step.slot] + len(step.tokens)
        if length > info.max_seq_len:
            raise BackendError(
                f"slot {step.slot} would hold {length} tokens, but it has room for "
                f"{info.max_seq_len}: rewind it or start with a larger --ctx"
            )
        if len(step.tokens) and not 0 <= min(step.tokens) <= max(step.tokens) < info.vocab_size:
            raise BackendError(
                f"a token id is outside the vocabulary: use 0 to {info.vocab_size - 1}"
            )
    if total > info.max_batch_len:
        raise BackendError(
            f"{total} tokens in one call, but at most {info.max_batch_len} fit: split them over "
            f"several calls"
        )
    return total
