from __future__ import annotations

import random
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from albor_train.fim import choose_span, context_segments, example_segments, split_chunks
from albor_train.spec import FimSpec, SpanKind
from tests.train.fixtures_train import source_file

TEXTS = st.text(alphabet=st.sampled_from("ab é漢\n\t :()="), max_size=200)
KINDS: tuple[SpanKind, ...] = get_args(SpanKind)


@settings(max_examples=300, deadline=None)
@example(":::::\n::::::\n:::\n\n::::::::", 12, 0)
@given(TEXTS, st.integers(1, 60), st.integers(0, 1000))
def test_chunks_join_to_the_text(text: str, limit: int, seed: int) -> None:
    chunks = split_chunks(text, limit, random.Random(seed))
    assert "".join(chunks) == text
    for chunk in chunks:
        assert len(chunk) <= limit or chunk.count("\n") <= 1


def test_chunks_prefer_top_level_lines() -> None:
    text = "".join(source_file(seed) for seed in range(20))
    chunks = split_chunks(text, 2000, random.Random(1))
    assert sum(chunk[0] not in " \n" for chunk in chunks) >= len(chunks) - 1


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(0, 1000), st.sampled_from(KINDS))
def test_spans_lie_in_the_text(text: str, seed: int, kind: SpanKind) -> None:
    span = choose_span(text, random.Random(seed), {kind: 1.0})
    if span is None:
        assert not text.strip()
        return
    assert 0 <= span.start <= span.end <= len(text)
    if kind == "rest_of_line":
        assert span.end == len(text) or text[span.end] == "\n"


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_examples_keep_every_character(
    text: str, seed: int, spm_share: float, boundary_share: float
) -> None:
    rng = random.Random(seed)
    span = choose_span(text, rng, FimSpec().spans)
    if span is None:
        return
    spec = FimSpec(spm_share=spm_share, boundary_share=boundary_share)
    segments = example_segments(text, span, spec, rng)
    controls = [s.text for s in segments if s.is_control]
    assert controls[-1] == "<|endoftext|>"
    pieces = "".join(s.text for s in segments if not s.is_control)
    middle, suffix = text[span.start : span.end], text[span.end :]
    prefix = text[: span.start]
    assert pieces in (suffix + prefix + middle, prefix + suffix + middle)


def test_spm_has_no_boundary_at_the_cursor_and_boundary_examples_do() -> None:
    text = "x = call(argument)\n"
    span = choose_span(text, random.Random(3), {"random": 1.0})
    assert span is not None
    joined = example_segments(text, span, FimSpec(spm_share=1, boundary_share=0), random.Random(0))
    apart = example_segments(text, span, FimSpec(spm_share=1, boundary_share=1), random.Random(0))
    assert len(apart) == len(joined) + 1
    assert apart[-2].text == text[span.start : span.end]


@pytest.mark.parametrize("kind", KINDS)
def test_cursors_stand_where_editors_put_them(kind: SpanKind) -> None:
    text = source_file(5)
    at_start = after_indent = within = 0
    for seed in range(400):
        span = choose_span(text, random.Random(seed), {kind: 1.0})
        assert span is not None
        assert span.kind == kind
        before = text[: span.start].rpartition("\n")[2]
        at_start += before == ""
        after_indent += before != "" and not before.strip()
        within += bool(before.strip())
    if kind in ("rest_of_line", "lines"):
        assert at_start > 40
        assert after_indent > 80
    if kind in ("rest_of_line", "random"):
        assert within > 100


def test_syntax_spans_are_nodes() -> None:
    import ast

    text = source_file(8)
    for seed in range(50):
        span = choose_span(text, random.Random(seed), {"block": 1.0})
        assert span is not None
        column = span.start - text.rfind("\n", 0, span.start) - 1
        ast.parse("if 1:\n" + " " * max(1, column) + text[span.start : span.end])


def test_context_names_the_files() -> None:
    segments = context_segments("proj", "a/b.py", [("a/c.py", "x = 1")])
    assert [s.text for s in segments] == [
        "<|repo_name|>",
        "proj\n",
        "<|file_sep|>",
        "a/c.py\nx = 1\n",
        "<|file_sep|>",
        "a/b.py\n",
    ]
