"""Which spans of a document become the middle, and the examples made of them.

The layout of an example is albor_serve.fim's; this file only chooses. Spans are cut in
characters, before tokenizing, and shaped as editing leaves them: the rest of a line, some lines,
a syntax node, anything. The cursor stands at a line's start, after its indentation, or within.
"""

from __future__ import annotations

import ast
import math
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from albor_serve.fim import TEMPLATES, Segment, fim_document
from albor_train.spec import FimSpec, SpanKind
from albor_train.tokenizer import END_OF_TEXT, FILE_SEP, REPO_NAME

__all__ = ["Span", "choose_span", "context_segments", "example_segments", "split_chunks"]

SPM: Final = TEMPLATES["albor"]
PSM: Final = TEMPLATES["qwen2.5-coder"]

_LONGEST_RANDOM: Final = 600
_MOST_LINES: Final = 12
_NODE_CHARS: Final = (8, 1_200)


@dataclass(frozen=True, slots=True)
class Span:
    """Characters start to end of a text, which become the middle."""

    start: int
    end: int
    kind: SpanKind


def split_chunks(text: str, max_chars: int, rng: random.Random) -> list[str]:
    """Cut a text at line starts into pieces of at most about `max_chars`; joined they are `text`.

    A piece ends before a top-level line where one is near. The first piece's length is random, so
    that each epoch cuts elsewhere. A single line longer than `max_chars` stays whole.
    """
    if len(text) <= max_chars:
        return [text]
    chunks: list[str] = []
    limit = rng.randint(max_chars // 2, max_chars)
    current: list[str] = []
    size = 0
    top_level = 0  # lines of `current` before its last top-level line in the second half
    for line in text.splitlines(keepends=True):
        # Twice where the lines after a top-level cut leave no room for this one either.
        while current and size + len(line) > limit:
            cut = top_level or len(current)
            chunks.append("".join(current[:cut]))
            current = current[cut:]
            size = sum(map(len, current))
            top_level = 0
            limit = max_chars
        if size > limit // 2 and line[0] not in " \t\n)]}#":
            top_level = len(current)
        current.append(line)
        size += len(line)
    if current:
        chunks.append("".join(current))
    return chunks


def choose_span(text: str, rng: random.Random, weights: Mapping[SpanKind, float]) -> Span | None:
    """A span of `text` of a random kind, or None where the text offers none (blank text)."""
    kinds = [kind for kind, weight in weights.items() if weight > 0]
    kind = rng.choices(kinds, [weights[kind] for kind in kinds])[0]
    lines = _line_spans(text)
    filled = [i for i, (start, end) in enumerate(lines) if text[start:end].strip()]
    if not filled:
        return None
    if kind == "block":
        node = _node_span(text, rng) or _indented_span(text, lines, filled, rng)
        if node is not None:
            return Span(*node, "block")
        kind = "lines"
    if kind == "random":
        length = min(len(text), round(math.exp(rng.uniform(0, math.log(_LONGEST_RANDOM)))))
        start = rng.randint(0, len(text) - length)
        return Span(start, start + length, "random")
    number = rng.choice(filled)
    start, end = lines[number]
    indent = start + len(text[start:end]) - len(text[start:end].lstrip(" \t"))
    if kind == "rest_of_line":
        where = rng.random()
        cursor = start if where < 0.2 else indent if where < 0.5 else rng.randint(indent, end)
        last = number
        if rng.random() < 0.25:
            last = min(len(lines) - 1, number + rng.randint(1, 2))
        return Span(cursor, lines[last][1], "rest_of_line")
    last = min(len(lines) - 1, number + round(math.exp(rng.uniform(0, math.log(_MOST_LINES)))) - 1)
    end = lines[last][1]
    if rng.random() < 0.5:
        # Whole lines: their last line end belongs to them.
        return Span(start, min(len(text), end + 1), "lines")
    return Span(indent, end, "lines")


def example_segments(text: str, span: Span, spec: FimSpec, rng: random.Random) -> list[Segment]:
    """A fill-in-the-middle example, its end-of-text token included."""
    prefix, middle, suffix = text[: span.start], text[span.start : span.end], text[span.end :]
    if rng.random() >= spec.spm_share:
        segments = fim_document(PSM, prefix, middle, suffix)
    elif rng.random() < spec.boundary_share:
        # A prompt that isn't healed has a token boundary at the cursor.
        segments = [*fim_document(SPM, prefix, "", suffix), Segment(middle, False)]
    else:
        segments = fim_document(SPM, prefix, middle, suffix)
    return [*segments, Segment(END_OF_TEXT, True)]


def context_segments(project: str, path: str, related: Sequence[tuple[str, str]]) -> list[Segment]:
    """What precedes a file of a repository: its name, related files, and the file's path.

    Args:
        related: (path, text) of other files, the most stable first.
    """
    segments = [Segment(REPO_NAME, True), Segment(f"{project}\n", False)]
    for other_path, text in related:
        segments += [Segment(FILE_SEP, True), Segment(f"{other_path}\n{text}\n", False)]
    return [*segments, Segment(FILE_SEP, True), Segment(f"{path}\n", False)]


def _line_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each line, line ends left out."""
    return [match.span() for match in re.finditer(r"[^\n]+|(?<=\n)(?=\n)|\A(?=\n)", text)]


def _node_span(text: str, rng: random.Random) -> tuple[int, int] | None:
    """A statement, a body or an expression of the text's syntax tree, if it parses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    lines = text.split("\n")

    def at(line: int, column: int) -> int:
        # The tree counts columns in UTF-8 bytes.
        row = lines[line - 1]
        if not row.isascii():
            column = len(row.encode()[:column].decode("utf-8", "ignore"))
        return starts[line - 1] + column

    found: list[tuple[int, int]] = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and not isinstance(node, ast.Module):
            first, last = body[0], body[-1]
            found.append(
                (at(first.lineno, first.col_offset), at(last.end_lineno, last.end_col_offset))
            )
        if isinstance(
            node,
            (
                ast.Call,
                ast.Dict,
                ast.List,
                ast.Tuple,
                ast.BinOp,
                ast.BoolOp,
                ast.Compare,
                ast.IfExp,
                ast.ListComp,
                ast.DictComp,
                ast.stmt,
            ),
        ) and not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            found.append(
                (at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset))
            )
    low, high = _NODE_CHARS
    found = [(start, end) for start, end in found if low <= end - start <= high]
    return rng.choice(found) if found else None


def _indented_span(
    text: str, lines: list[tuple[int, int]], filled: list[int], rng: random.Random
) -> tuple[int, int] | None:
    """The deeper-indented lines below a random line that ends with a colon."""

    def depth(number: int) -> int:
        start, end = lines[number]
        return len(text[start:end]) - len(text[start:end].lstrip(" \t"))

    heads = [number for number in filled if text[slice(*lines[number])].rstrip().endswith(":")]
    rng.shuffle(heads)
    for head in heads[:8]:
        body = [number for number in filled if number > head]
        count = 0
        while count < len(body) and depth(body[count]) > depth(head):
            count += 1
        if count:
            first, last = body[0], body[count - 1]
            start, end = lines[first][0] + depth(first), lines[last][1]
            if end - start <= _NODE_CHARS[1]:
                return start, end
    return None
