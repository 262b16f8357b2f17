"""What every backend refuses before it touches a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from albor_serve.backends.base import BackendInfo, ExtendStep
from albor_serve.errors import BackendError, ConfigError

__all__ = [
    "check_cache_memory",
    "check_fork",
    "check_rewind",
    "check_sizes",
    "check_slot",
    "check_steps",
]


def check_sizes(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ConfigError unless each size, (value, most) by name, is 1 or more and at most that."""
    for name, (value, most) in sizes.items():
        if not 1 <= value <= most:
            raise ConfigError(f"{name} is {value}: it must be a whole number, 1 to {most}")


def check_cache_memory(
    bytes_per_token: int, num_slots: int, max_seq_len: int, available: int | None
) -> None:
    """Refuse caches that would make the system kill a process: memory is promised, not reserved.

    `available` is the free memory in bytes, None where it is not known. Raises BackendError.
    """
    needed = bytes_per_token * num_slots * max_seq_len
    if available is not None and needed > available:
        raise BackendError(
            f"KV caches for {num_slots} slots of {max_seq_len} tokens need {needed / 2**30:.1f} "
            f"GiB and {available / 2**30:.1f} GiB of memory are free: lower --slots or --ctx"
        )


def check_rewind(info: BackendInfo, slot: int, length: int) -> None:
    """Raise BackendError unless `slot` exists and may be cut to `length` tokens."""
    check_slot(info, slot)
    if length < 0:
        raise BackendError(f"cannot rewind to {length} tokens: give 0 or more")


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
