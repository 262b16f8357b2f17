from __future__ import annotations

import random
import statistics

from hypothesis import given
from hypothesis import strategies as st

from albor_serve.bench.replay.typist import FAST, NORMAL, keystrokes


@given(st.text(alphabet="ab_ \t\n(é🐍", max_size=60))
def test_keystrokes_give_back_the_text(text: str) -> None:
    assert "".join(keystrokes(text)) == text


def test_a_line_end_brings_its_indentation() -> None:
    assert keystrokes("a:\n    b") == ["a", ":", "\n    ", "b"]


def test_delays_are_seeded_and_bounded() -> None:
    keys = keystrokes("return value\n    other = 1\n" * 20)
    first = NORMAL.delays(keys, random.Random(1))
    assert first == NORMAL.delays(keys, random.Random(1))
    assert first != NORMAL.delays(keys, random.Random(2))
    assert all(0 < delay <= NORMAL.max_ms / 1000 for delay in first)


def test_people_pause_at_words_and_lines_and_the_fast_one_less() -> None:
    keys = keystrokes("alpha beta\n" * 400)
    delays = NORMAL.delays(keys, random.Random(3))

    def median(at: int) -> float:
        return statistics.median(delays[at :: len("alpha beta\n")])

    assert abs(median(2) - 0.190) < 0.02  # inside a word: the documented median
    assert median(6) > 1.3 * median(2)  # "b" of beta
    assert median(0) > 2 * median(6)  # after the line end
    assert sum(FAST.delays(keys, random.Random(3))) < 0.6 * sum(delays)
