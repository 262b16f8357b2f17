from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albor_serve.kv_slots import Slot, SlotTable, common_prefix_len


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def arr(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def fill(slot: Slot, tokens: np.ndarray) -> None:
    slot.tokens[: tokens.size] = tokens
    slot.cached_len = tokens.size


def make(num_slots: int = 3) -> tuple[SlotTable, Clock]:
    clock = Clock()
    return SlotTable(num_slots, 512, clock), clock


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_common_prefix_len(a: list[int], b: list[int]) -> None:
    naive = 0
    while naive < min(len(a), len(b)) and a[naive] == b[naive]:
        naive += 1
    assert common_prefix_len(arr(*a), arr(*b)) == naive


def test_takes_the_slot_that_saves_most() -> None:
    table, _ = make()
    fill(table.slots[0], arr(1, 2, 9))
    fill(table.slots[1], arr(1, 2, 3, 4))
    fill(table.slots[2], arr(7))
    choice = table.choose(arr(1, 2, 3, 5, 6), None, 4)
    assert choice is not None
    assert (choice.slot.index, choice.reuse_len, choice.fork_from) == (1, 3, None)


def test_reuse_is_capped_and_stale_tokens_beyond_the_cache_do_not_count() -> None:
    table, _ = make(1)
    fill(table.slots[0], arr(1, 2, 3))
    choice = table.choose(arr(1, 2, 3), None, 2)
    assert choice is not None
    assert choice.reuse_len == 2
    table.slots[0].cached_len = 1
    choice = table.choose(arr(1, 2, 3), None, 2)
    assert choice is not None
    assert choice.reuse_len == 1


def test_none_when_all_are_busy() -> None:
    table, _ = make(1)
    table.acquire(table.slots[0], None)
    assert table.choose(arr(1), None, 0) is None


def test_a_session_keeps_its_slot_and_it_is_spared() -> None:
    table, _ = make(2)
    fill(table.slots[1], arr(1, 2, 3))
    table.acquire(table.slots[1], "a")
    table.release(table.slots[1])
    stranger = table.choose(arr(1, 2, 3, 4), None, 3)
    assert stranger is not None
    assert stranger.slot.index == 0
    own = table.choose(arr(9, 9), "a", 1)
    assert own is not None
    assert own.slot.index == 1


def test_protection_ends_with_time_and_under_pressure() -> None:
    table, clock = make(2)
    for slot, session in zip(table.slots, "ab", strict=True):
        table.acquire(slot, session)
        table.release(slot)
    oldest = table.choose(arr(1), "c", 0)
    assert oldest is not None
    assert oldest.slot.index == 0
    clock.now += SlotTable.PROTECT_S + 10
    fill(table.slots[1], arr(1, 2))
    late = table.choose(arr(1, 2), "c", 1)
    assert late is not None
    assert late.slot.index == 1


def test_a_long_common_prefix_is_copied_from_a_busy_or_foreign_slot() -> None:
    table, _ = make(2)
    long = np.arange(200, dtype=np.int32)
    fill(table.slots[0], long)
    table.acquire(table.slots[0], "a")
    choice = table.choose(long, "b", 199)
    assert choice is not None
    assert choice.slot.index == 1
    assert choice.fork_from is table.slots[0]
    assert choice.reuse_len == 199


def test_a_short_common_prefix_is_not_worth_a_copy() -> None:
    table, _ = make(2)
    fill(table.slots[0], np.arange(SlotTable.MIN_FORK_GAIN - 1, dtype=np.int32))
    table.acquire(table.slots[0], None)
    choice = table.choose(np.arange(200, dtype=np.int32), None, 199)
    assert choice is not None
    assert choice.fork_from is None
    assert choice.reuse_len == 0


def test_an_empty_slot_goes_before_one_with_content() -> None:
    table, _ = make(2)
    fill(table.slots[0], arr(5, 6, 7))
    choice = table.choose(arr(1, 2), None, 1)
    assert choice is not None
    assert choice.slot.index == 1


def test_longest_is_the_slot_with_the_longest_common_beginning_busy_or_free() -> None:
    table, _ = make()
    fill(table.slots[0], arr(1, 2, 9))
    fill(table.slots[2], arr(1, 2, 3, 4, 5))
    chosen = table.choose(arr(1, 2, 3, 4, 5), None, 5)
    assert chosen is not None
    slot, length = table.longest(arr(1, 2, 3, 4, 8))
    assert (slot.index, length) == (2, 4)
    assert table.longest(arr(8))[1] == 0


@pytest.mark.parametrize(("own", "other", "is_copied"), [(40, 100, False), (40, 104, True)])
def test_a_copy_must_save_enough_beyond_what_is_there(
    own: int, other: int, is_copied: bool
) -> None:
    table, _ = make(2)
    prompt = np.arange(200, dtype=np.int32)
    fill(table.slots[0], prompt[:own])
    table.acquire(table.slots[0], "a")
    table.release(table.slots[0])
    fill(table.slots[1], prompt[:other])
    table.acquire(table.slots[1], "b")
    choice = table.choose(prompt, "a", 199)
    assert choice is not None
    assert choice.slot.index == 0
    assert choice.fork_from is (table.slots[1] if is_copied else None)
    assert choice.reuse_len == (other if is_copied else own)


def test_protection_ends_on_the_second() -> None:
    now = [0.0]
    table = SlotTable(2, 16, lambda: now[0])
    for slot, session in zip(table.slots, "ab", strict=True):
        fill(slot, arr(1, 2))
        table.acquire(slot, session)
        table.release(slot)
    table.slots[1].last_used_s = 1.0
    now[0] = SlotTable.PROTECT_S
    fill(table.slots[0], arr(7))
    choice = table.choose(arr(1, 2), None, 2)
    assert choice is not None
    assert choice.slot.index == 0  # free to take, although the other holds the prompt
