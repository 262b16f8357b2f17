"""The buffer against the plainest model of a client's text."""

from __future__ import annotations

import re
import time

import pytest
from albor_lsp.document import Change, Document, Encoding, Point, Position, split_lines, to_changes
from hypothesis import given, seed, settings
from hypothesis import strategies as st

ENCODINGS: tuple[Encoding, ...] = ("utf-8", "utf-16", "utf-32")
CODECS = {"utf-8": ("utf-8", 1), "utf-16": ("utf-16-le", 2), "utf-32": ("utf-32-le", 4)}
# What goes wrong elsewhere: other line ends, separators, astral and combining characters.
PIECES = [
    "a",
    "Z9_",
    " ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\f",
    "\v",
    "\x85",
    "\u2028",
    "é",
    "́",
    "€",
    "😀",
]
texts = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


def size_of(text: str, encoding: Encoding) -> int:
    codec, width = CODECS[encoding]
    return len(text.encode(codec)) // width


def places(text: str, encoding: Encoding) -> list[tuple[int, Position]]:
    """Every offset that a client can name, with its position; not inside a line break."""
    found, line, start = [], 0, 0
    for offset in range(len(text) + 1):
        if text[offset - 1 : offset + 1] == "\r\n" and offset:
            continue
        found.append((offset, Position(line, size_of(text[start:offset], encoding))))
        if offset < len(text) and (text[offset] == "\n" or (text[offset] == "\r")):
            line += 1
            start = offset + (2 if text[offset : offset + 2] == "\r\n" else 1)
    return found


@st.composite
def sessions(draw: st.DrawFn) -> tuple[str, Encoding, list[tuple[Change, str]]]:
    """(first text, encoding, edits with the client's text after each)."""
    encoding = draw(st.sampled_from(ENCODINGS))
    first = text = draw(texts)
    edits = []
    for _ in range(draw(st.integers(1, 5))):
        new = draw(texts)
        if draw(st.integers(0, 9)) == 0:
            edits.append((Change(new), new))
            text = new
            continue
        known = places(text, encoding)
        (start, at), (end, to) = sorted(
            [draw(st.sampled_from(known)), draw(st.sampled_from(known))]
        )
        text = text[:start] + new + text[end:]
        edits.append((Change(new, at, to), text))
    return first, encoding, edits


def check(session: tuple[str, Encoding, list[tuple[Change, str]]]) -> None:
    first, encoding, edits = session
    document = Document("u", "python", first)
    for change, text in edits:
        end = document.apply([change], encoding)
        assert document.text == text
        assert document.lines == split_lines(text)
        assert 0 <= end.line < len(document.lines)
    for offset, position in places(document.text, encoding):
        point = document.point(position, encoding)
        assert document.offset(point) == offset
        assert document.position(point, encoding) == position


@given(sessions())
@settings(max_examples=300, deadline=None)
def test_equals_the_clients_text(session: tuple[str, Encoding, list[tuple[Change, str]]]) -> None:
    check(session)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", range(50))
def test_equals_the_clients_text_in_many_cases(batch: int) -> None:
    """100,000 cases; in batches, so that one sees it go on and memory stays small."""

    @seed(batch)
    @given(sessions())
    @settings(max_examples=2_000, deadline=None, database=None)
    def run(session: tuple[str, Encoding, list[tuple[Change, str]]]) -> None:
        check(session)

    run()


def test_lines_end_only_where_lsp_says() -> None:
    text = "a\fb\vc\u2028d\x85e\nf\r\ng\rh"
    assert split_lines(text) == ["a\fb\vc\u2028d\x85e\n", "f\r\n", "g\r", "h"]
    assert split_lines("") == [""]
    assert split_lines("a\n") == ["a\n", ""]


def test_positions_out_of_range_are_clamped() -> None:
    document = Document("u", "python", "ab\r\nc😀\n")
    assert document.point(Position(0, 99), "utf-16") == (0, 2)
    assert document.point(Position(9, 0), "utf-16") == (2, 0)
    assert document.point(Position(1, 2), "utf-16") == (1, 1)  # inside the pair
    assert document.point(Position(1, 3), "utf-16") == (1, 2)
    assert document.point(Position(1, 3), "utf-8") == (1, 1)  # inside the bytes
    assert document.point(Position(-1, -1), "utf-8") == (0, 0)


def test_a_reversed_range_is_taken_as_meant() -> None:
    document = Document("u", "python", "abcd")
    document.apply([Change("X", Position(0, 3), Position(0, 1))], "utf-16")
    assert document.text == "aXd"


def test_halves_of_a_pair_become_one_character() -> None:
    document = Document("u", "python", "")
    document.apply([Change("\ud83d", Position(0, 0), Position(0, 0))], "utf-16")
    document.apply([Change("\ude00", Position(0, 1), Position(0, 1))], "utf-16")
    assert document.text == "😀"


def test_the_end_of_an_edit_is_where_the_cursor_is() -> None:
    document = Document("u", "python", "def f():\n    pass\n")
    end = document.apply([Change("x = 1\n    ", Position(1, 4), Position(1, 8))], "utf-16")
    assert end == Point(2, 4)


def test_an_edit_costs_little_in_a_long_file() -> None:
    document = Document("u", "python", "x = some_function(1)\n" * 5000)
    started = time.perf_counter()
    for at in range(1000):
        place = Position(2500 + at, 3)
        document.apply([Change("y", place, place)], "utf-16")
    # Far from the 1 ms a whole-file split takes; the limit is for a machine that is busy.
    assert time.perf_counter() - started < 0.5


def test_changes_are_read_from_messages() -> None:
    span = {"start": {"line": 0, "character": 1}, "end": {"line": 0, "character": 2}}
    assert to_changes([{"text": "x"}, {"range": span, "text": ""}]) == [
        Change("x"),
        Change("", Position(0, 1), Position(0, 2)),
    ]
    with pytest.raises((KeyError, TypeError)):
        to_changes([{"text": 3}])


def test_the_model_of_this_test_knows_line_ends() -> None:
    for text in ("a\r\nb\rc\nd", "\r\r\n\n"):
        assert places(text, "utf-32")[-1][1].line == len(re.findall("\r\n|\r|\n", text))
