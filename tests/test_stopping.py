from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albor_serve.errors import RequestError
from albor_serve.stopping import IndentGuard, TextAssembler


def feed_all(assembler: TextAssembler, chunks: list[bytes]) -> list[str]:
    return [*(assembler.feed(chunk) for chunk in chunks), assembler.flush()]


def expected(text: str, stops: list[str]) -> str:
    """Cut at the first place where some stop string is complete, seen character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize(
    ("chunks", "stops", "shown"),
    [
        ([b"abc"], (), ["abc", ""]),
        ([b"ab\n", b"cd"], ("\n",), ["ab", "", ""]),
        ([b"a\n", b"\nb"], ("\n\n",), ["a", "", ""]),
        ([b"a\n", b"b"], ("\n\n",), ["a", "\nb", ""]),
        ([b"x\n"], ("\n\n",), ["x", "\n"]),
        ([b"one two"], ("two", "o"), ["", ""]),
        ([b"ab\r", b"\ncd"], ("\r\n",), ["ab", "", ""]),
        (["é".encode()[:1], "é".encode()[1:]], (), ["", "é", ""]),
        ([b"\xff\xfe"], (), ["\ufffd\ufffd", ""]),
        (["🙂".encode()[:3]], (), ["", ""]),
        ([b"aXY", b"ZW"], ("XYZW", "Y"), ["aX", "", ""]),
    ],
)
def test_cases(chunks: list[bytes], stops: tuple[str, ...], shown: list[str]) -> None:
    assert feed_all(TextAssembler(stops), chunks) == shown


def test_names_the_stop_string_it_found() -> None:
    assembler = TextAssembler(("zz", "\n"))
    assembler.feed(b"a\nb")
    assert assembler.stopped_by == "\n"


def test_refuses_an_empty_stop_string() -> None:
    with pytest.raises(RequestError, match=r"^a stop string is empty: leave it out$") as caught:
        TextAssembler(("a", ""))
    assert caught.value.param == "stop"


def test_nothing_comes_after_a_stop_string_or_twice() -> None:
    assembler = TextAssembler(("stop",))
    assert assembler.feed(b"one st") == "one "
    assert assembler.feed(b"op two") == ""
    assert (assembler.stopped_by, assembler.flush()) == ("stop", "")
    open_end = TextAssembler(("stop",))
    assert open_end.feed(b"one sto") == "one "
    assert (open_end.flush(), open_end.flush()) == ("sto", "")


@given(
    text=st.text(alphabet="ab\né🙂", max_size=30),
    stops=st.lists(st.text(alphabet="ab\né🙂", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 100), max_size=8),
)
def test_chunking_never_changes_the_text(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    chunks = [data[a:b] for a, b in pairwise(edges)]
    one_by_one = [data[i : i + 1] for i in range(len(data))]
    for pieces in (chunks, one_by_one):
        shown = "".join(feed_all(TextAssembler(stops), pieces))
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
    assert "".join(feed_all(TextAssembler(stops), one_by_one)) == expected(text, stops)


@given(st.binary(max_size=40))
def test_any_bytes_give_text(data: bytes) -> None:
    shown = "".join(feed_all(TextAssembler(()), [data[i : i + 1] for i in range(len(data))]))
    assert data.decode("utf-8", errors="replace").startswith(shown)


LINES = st.lists(
    st.builds(
        "".join,
        st.tuples(st.sampled_from(["", " ", "  ", "\t", "   "]), st.sampled_from(["", "x", "y z"])),
    ),
    max_size=6,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n  b\n  c", "a\n  b\n  c"),
        ("a\n  b\nc", "a\n  b"),
        ("a\n\n  b\n\nc", "a\n\n  b"),
        ("a\r\n  b\r\nc", "a\r\n  b"),
        ("a\n\t\tb\n\tc", "a\n\t\tb"),
        ("a\n b", "a"),
        ("a\n", "a\n"),
        ("a\n   \n", "a\n   \n"),
        ("b", "b"),
        ("\nb", ""),
        ("a\n   \nb", "a"),
        ("a\n \fb", "a"),
        ("a\nXXb", "a"),
    ],
)
def test_a_line_with_too_little_indentation_ends_the_answer(text: str, shown: str) -> None:
    guard = IndentGuard(2)
    assert guard.feed(text) + guard.flush() == shown
    assert guard.is_done == (shown != text)
    assert guard.feed("more") == ("" if guard.is_done else "more")


@given(LINES, st.integers(0, 3), st.data())
def test_an_indent_guard_streams_what_it_says_at_once(
    lines: list[str], min_indent: int, data: st.DataObject
) -> None:
    text = data.draw(st.sampled_from(["\n", "\r\n"])).join(lines)
    whole = IndentGuard(min_indent)
    expected = whole.feed(text) + whole.flush()
    parts = IndentGuard(min_indent)
    shown = "".join(parts.feed(char) for char in text) + parts.flush()
    assert shown == expected
    assert text.startswith(shown)
    kept = [line for line in shown.splitlines()[1:] if line.strip()]
    if parts.is_done:
        assert all(len(line) - len(line.lstrip()) >= min_indent for line in kept)
    else:
        assert shown == text


@pytest.mark.parametrize(("min_indent", "shown"), [(0, "a\n b\nc"), (1, "a\n b"), (2, "a")])
def test_as_much_indentation_as_asked_is_enough(min_indent: int, shown: str) -> None:
    guard = IndentGuard(min_indent)
    assert guard.feed("a\n b\nc") + guard.flush() == shown
    assert guard.is_done == (min_indent > 0)


def test_an_indent_guard_holds_back_line_ends_alone() -> None:
    guard = IndentGuard(2)
    assert guard.feed("ab\n") == "ab"
    assert guard.feed("\r") == ""
    assert guard.feed("\n  c\r") == "\n\r\n  c"
    assert (guard.flush(), guard.flush()) == ("\r", "")
