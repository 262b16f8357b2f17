from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albor_serve.errors import RequestError
from albor_serve.stopping import TextAssembler


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
    with pytest.raises(RequestError, match="empty"):
        TextAssembler(("a", ""))


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
