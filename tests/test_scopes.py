from __future__ import annotations

import time
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor_serve.scopes import (
    LOOK_STEP_CHARS,
    MAX_LOOK_CHARS,
    LexerMemo,
    ScopeGuard,
    StopScope,
    _Lexer,
    style_of,
)


def run(
    scope: StopScope, before: str, answer: str, after: str = "", path: str | None = None
) -> tuple[str, str | None]:
    guard = ScopeGuard(scope, before, after, path)
    text = "".join(guard.feed(char) for char in answer) + guard.flush()
    return text, guard.stopped_by


# (path, before the cursor, the model's answer, after the cursor, shown, stopped by)
LINE = [
    ("a.py", "x = ", "1\ny = 2", "", "1", "line"),
    ("a.py", "x = ", "1", "", "1", None),
    ("a.py", "def f():\n", "    return 1\n    x", "", "    return 1", "line"),
    ("a.py", "def f():\n", "\n\n    return 1\nx", "", "\n\n    return 1", "line"),
    ("a.py", "def f():", "\n    return 1\n\n", "", "\n    return 1", "line"),
    ("a.py", "foo(", "\n    a,\n", "  # why\n", "", "line"),
    ("a.ts", "let a = ", "1;\r\nlet b", "\r\n", "1;", "line"),
    ("a.ts", "let a = ", "1;\rx", "", "1;\rx", None),
    ("a.py", "x = ", '"""a\nb"""\n', "", '"""a', "line"),
]
BLOCK = [
    ("a.py", "def f():\n    ", "a = 1\n    b\n\n    c\n", "", "a = 1\n    b", "block"),
    ("a.py", "def f():\n    ", "a = 1\ndef g():", "", "a = 1", "block"),
    ("a.py", "def f():\n", "    a = 1\n\ndef g():", "", "    a = 1", "block"),
    ("a.py", "def f():", "\n    a\n\n    b\n\n\nx = 1", "", "\n    a\n\n    b", "block"),
    ("a.py", "for i in", " x:\n    a\nb = 1", "", " x:\n    a", "block"),
    ("a.py", "x = ", "[\n1,\n\n2,\n]\ny = 2\n\nz", "", "[\n1,\n\n2,\n]", "block"),
    ("a.py", "x = foo(", "a,\n    b)\ny\n\nz", "", "a,\n    b)", "block"),
    ("a.py", "x = foo(", "a)\ny\n\nz", "", "a)\ny", "block"),
    ("a.py", "x = ", '"""(\n\n(\n"""\ny\n\nz', "", '"""(\n\n(\n"""\ny', "block"),
    ("a.py", "    x = 1", "  # ( [ {\n    y\n\n    z", "", "  # ( [ {\n    y", "block"),
    ("a.py", "", "\n\nx = 1\n\ny", "", "\n\nx = 1", "block"),
    ("a.py", "\tx", " = 1\n\ty\nz", "", " = 1\n\ty", "block"),
    ("a.js", "for (const a of b", ") {\n  c(a)\n}\nd()", "", ") {\n  c(a)\n}", "block"),
    ("a.js", "if (a", ") {\n  b\n} else {\n  c\n}\nd", "", ") {\n  b\n} else {\n  c\n}", "block"),
    ("a.js", "  a(", "'}', `{\n\n{`)\n  b()\n\n  c", "", "'}', `{\n\n{`)", "block"),
    ("a.go", "\tx := ", "1\r\n\ty\r\n\r\n\tz", "", "1\r\n\ty", "block"),
    ("a.yaml", "a:\n  b: ", "1\n  c: 2\nd: 3", "", "1\n  c: 2", "block"),
    (
        "a.html",
        "<ul>\n  ",
        "<li>a</li>\n  <li>don't</li>\n</ul>",
        "",
        "<li>a</li>\n  <li>don't</li>",
        "block",
    ),
]
SCOPE = [
    ("a.py", "def f():\n    ", "a\n\n    b\n\nx", "", "a\n\n    b", "scope"),
    ("a.py", "def f():", "\n    a\n\n    b\nx", "", "\n    a\n\n    b", "scope"),
    ("a.py", "def f():  # note", "\n    a\nx", "", "\n    a", "scope"),
    (
        "a.py",
        "    ",
        "if a:\n        b\n    return\nx",
        "",
        "if a:\n        b\n    return",
        "scope",
    ),
    ("a.py", "    ", '"""Doc.\n\nText\n"""\n    a\nb', "", '"""Doc.\n\nText\n"""\n    a', "scope"),
    ("a.py", "x = {\n    ", '"a": 1,\n}\ny = 2', "", '"a": 1,\n}', "scope"),
    ("a.py", "x = {\n    ", '"a": 1,\n}\ny = 2', "\n}\n", '"a": 1,', "suffix"),
    ("a.ts", "function f() {\n  ", "a()\n\n  b()\n}\n\nx", "", "a()\n\n  b()\n}", "scope"),
    ("a.ts", "function f() {\n  ", "a()\n}\n\nx", "\n}\n", "a()", "suffix"),
    (
        "a.ts",
        "function f() {\n  if (a) {\n    ",
        "b()\n  }\n  c()\n}",
        "\n}\n",
        "b()\n  }",
        "scope",
    ),
    ("a.ts", "f(() => {\n  ", "a()\n});\nb()", "", "a()\n});", "scope"),
    ("a.ts", "f(", "a)\ng()", ")\n", "a", "suffix"),
    ("a.ts", "f(", "g(a))\nh()", ")\n", "g(a)", "suffix"),
    ("a.ts", "f(", "g(a)", ")\n", "g(a)", None),
    (
        "a.rs",
        "fn f<'a>(x: &'a str) {\n    ",
        "g('}');\n    h()\n}\nx",
        "",
        "g('}');\n    h()\n}",
        "scope",
    ),
    (
        "a.c",
        "int f(void) {\n    ",
        "a();\n#ifdef B\n    b();\n#endif\n}\nint g",
        "",
        "a();\n#ifdef B\n    b();\n#endif\n}",
        "scope",
    ),
    (
        "a.c",
        "int f(void) {\n    ",
        "a(); /* } */ // }\n    b();\n}\nint g",
        "",
        "a(); /* } */ // }\n    b();\n}",
        "scope",
    ),
    ("a.go", "func f() {\n\t", 'a("}")\n\tb()\n}\n\nfunc g', "", 'a("}")\n\tb()\n}', "scope"),
    ("a.go", "func f() {\r\n\t", "a()\r\n}\r\nx", "\r\n}\r\n", "a()", "suffix"),
    ("a.yaml", "a:\n  - ", "b: {c: 1}\n\n  - d\ne: 1", "", "b: {c: 1}\n\n  - d", "scope"),
    ("a.py", "    ", "f'{x}'\n    (y)\nz", "", "f'{x}'\n    (y)", "scope"),
    ("a.py", "    ", "''\n    a\nz", "", "''\n    a", "scope"),
]
SUFFIX = [
    ("a.py", "x = ", "1\nprint(x)\ny", "\nprint(x)\n", "1", "suffix"),
    ("a.py", "x = ", "1\nprint(xs)\n", "\nprint(x)\n", "1\nprint(xs)\n", None),
    ("a.py", "x = ", "1\n    print(x)\n", "\nprint(x)\n", "1\n    print(x)\n", None),
    ("a.py", "", "print(x)\n", "\nprint(x)\n", "", "suffix"),
    ("a.py", "    ", "print(x)\n    y", "\n\n    print(x)\n", "", "suffix"),
    ("a.py", "x = ", "1\nprint(x)", "\nprint(x)\n", "1", "suffix"),
    ("a.py", 'print("', 'hello")\nx', '")\n', "hello", "suffix"),
    ("a.py", "for ", "i in range(9):\n", " in range(9):\n", "i ", "suffix"),
    ("a.ts", "const a = ", "b ? c : d;\n", ": d;\n", "b ? c ", "suffix"),
    ("a.sh", "if a; then\n  ", "b\nfi\nc", "\nfi\n", "b", "scope"),
]
EDGES = [
    # Where the cursor's line begins, and how deep it is.
    ("block", "a.py", "import os\nx = 1\n", "\n\ny = 1\n\nz", "", "\n\ny = 1", "block"),
    ("scope", "a.py", "def f():\n", "\n    a = 1\nb = 2", "", "\n    a = 1", "scope"),
    ("scope", "a.py", "def f():\n  ", "  a = 1\n  b = 2", "", "  a = 1", "scope"),
    ("line", "a.py", "    ", "\nx = 1\ny", "", "\nx = 1", "line"),
    ("scope", "a.py", "if a", " and b:\n    c\nd = 1", "", " and b:\n    c\nd = 1", None),
    ("scope", "a.c", "  ", "a();\n b();\n", "", "a();", "scope"),
    ("scope", "a.c", "  ", "a();\n#if X\n  b();\nc", "", "a();\n#if X\n  b();", "scope"),
    # Brackets that nobody opened.
    ("block", "a.py", "x = ", "1)\ny = 2\n\nz", "", "1)", "block"),
    ("block", "a.py", "x = ", "1)) + (\ny", "", "1)) + (", "block"),
    ("block", "a.py", "x = ", "1) + (\n2)\ny\n\nz", "", "1) + (\n2)", "block"),
    # Brackets of one line are told apart, and so are kinds.
    ("scope", "a.py", "f(1, (", "g(x), y))", "))\n", "g(x), y", "suffix"),
    ("scope", "a.py", "f([", "1], 2", ")\n", "1], 2", None),
    # After a character's literal, which nobody may take for the beginning of one.
    ("block", "a.rs", "    ", "f('a');\n\n    g();", "", "f('a');", "block"),
    # What follows the cursor.
    ("block", "a.py", "", "x = 1  \ny", "= 1\nz", "x ", "suffix"),
    ("scope", "a.rb", "", "b\nend\nc", "\nend\n", "b", "suffix"),
    ("scope", "a.sh", "", "b\nfi\nc", "\nfi\n", "b\nfi\nc", None),
]
CASES = [
    *EDGES,
    *(("line", *case) for case in LINE),
    *(("block", *case) for case in BLOCK),
    *(("scope", *case) for case in (*SCOPE, *SUFFIX)),
]


@pytest.mark.parametrize(
    ("scope", "path", "before", "answer", "after", "shown", "stopped_by"), CASES
)
def test_cases(
    scope: StopScope,
    path: str,
    before: str,
    answer: str,
    after: str,
    shown: str,
    stopped_by: str | None,
) -> None:
    assert run(scope, before, answer, after, path) == (shown, stopped_by)


def _read(code: str, path: str) -> _Lexer:
    lexer = _Lexer(style_of(path, ""))
    for char in code:
        lexer.feed(char)
    return lexer


# (path, code, what would close its brackets)
BRACKETS = [
    ("a.py", "([{", ")]}"),
    ("a.py", "([{]", ")"),
    ("a.py", "([{)", ""),
    ("a.py", "(]", ")"),
    ("a.py", "# (\n[", "]"),
    ("a.py", "x\n#(", ""),
    ("a.py", "x #(", ""),
    ("a.sh", "a#b(", ")"),
    ("a.sh", "$#(", ")"),
    ("a.sh", "\\#(", ")"),
    ("a.c", "&//(", ")"),
    ("a.js", "X//(", ""),
    ("a.js", "a//(\n[", "]"),
    ("a.js", "http://(", ")"),
    ("a.js", "://(", ")"),
    ("a.js", "/*(\n(*/[", "]"),
    ("a.js", "/*\\*/(", ")"),
    ("a.js", "/*a*/*(", ")"),
    ("a.js", "// \\\n(", ")"),
    ("a.py", "'('[", "]"),
    ("a.py", "'('\n[", "]"),
    ("a.py", "'(\n[", "]"),
    ("a.py", '"\\"("[', "]"),
    ("a.py", '"\\\\"[', "]"),
    ("a.py", '"\\\n(', ")"),
    ("a.py", '"\\"x"(', ")"),
    ("a.py", '"a\'b"(', ")"),
    ("a.py", '""(', ")"),
    ("a.py", '"""(', ""),
    ("a.py", '"""("(\n("""[', "]"),
    ("a.py", "'''a''\n'(", ""),
    ("a.py", '"ab""c"(', ")"),
    ("a.py", "\"a\"'('", ""),
    ("a.py", "x\n'('", ""),
    ("a.js", "`a\n${b(", ""),
    # Apostrophes and character literals.
    ("a.md", "don't (", ")"),
    ("a.py", "don't (", ")"),
    ("a.py", "rb'('", ""),
    ("a.py", "b'('", ""),
    ("a.py", 'abc"("', ""),
    ("a.py", "a b'('", ""),
    ("a.rs", "a(", ")"),
    ("a.rs", "'(' [", "]"),
    ("a.rs", "x='(' [", "]"),
    ("a.rs", "(')'", ")"),
    ("a.rs", "&'a [", "]"),
    ("a.rs", "'\"' (", ")"),
    ("a.rs", "x('\"') (", ")"),
    ("a.py", '"""a\\"""(\n"""[', "]"),
    ("a.py", "''\"(", ""),
    ("a.py", "''(", ")"),
    ("a.rs", "x '\"' [(", "])"),
    ("a.rs", "f('a')[", "]"),
    ("a.rs", "f('\\n')[", "]"),
    ("a.rs", "['(', '[']", ""),
    ("a.rs", '"(" [', "]"),
    ("a.rs", 'x"("', ""),
]


@pytest.mark.parametrize(("path", "code", "closers"), BRACKETS)
def test_brackets_of_strings_and_comments_do_not_count(path: str, code: str, closers: str) -> None:
    assert "".join(each.closer for each in _read(code, path).open) == closers


@pytest.mark.parametrize(
    ("path", "code", "is_in_text"),
    [
        ("a.py", "x", False),
        ("a.py", "'''a", True),
        ("a.py", "'a", False),
        ("a.py", "# a", False),
        ("a.py", "'''a'''", False),
        ("a.js", "/* a", True),
        ("a.js", "// a", False),
        ("a.html", "<!-- a", True),
    ],
)
def test_long_texts_go_on_in_the_next_line(path: str, code: str, is_in_text: bool) -> None:
    lexer = _read(code, path)
    assert lexer.is_in_text is is_in_text
    lexer.feed("\n")
    assert lexer.is_in_text is is_in_text


@pytest.mark.parametrize(
    ("line", "indent"),
    [("", 0), ("  x  ", 2), ("\tx\t", 4), ("\t\tx", 8), (" \tx", 4), ("\t  x", 6), ("\r\f x", 1)],
)
def test_indentation_is_what_stands_before_the_text(line: str, indent: int) -> None:
    for lines in ("", "y\n", "\n\n    y\n"):
        lexer = _read(lines + line, "a.py")
        assert (lexer.indent, lexer.line) == (indent, lines.count("\n"))
        many = _Lexer(style_of("a.py", ""))
        many.read(lines + line)
        assert (many.indent, many.line) == (indent, lines.count("\n"))


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("", ""),
        ("abc", "c"),
        ("abc  ", "c"),
        ("if a:  # why", ":"),
        ("x = 'a'", "'"),
        ("x = 'a", "'"),
        ('x = """a', '"'),
        ("a:\n", ""),
        ("a\n  ", ""),
    ],
)
def test_the_last_character_of_a_lines_code(code: str, last: str) -> None:
    assert _Lexer(style_of("a.py", "")).last_code == ""
    assert _read(code, "a.py").last_code == last
    lexer = _Lexer(style_of("a.py", ""))
    lexer.read(code)
    assert lexer.last_code == last


def test_brackets_know_their_place() -> None:
    first, second, third = _read("x\n  f(\n\t[{", "a.py").open
    assert (first.line, first.indent) == (1, 2)
    assert (second.line, second.indent) == (third.line, third.indent) == (2, 4)
    assert len({first, second, third}) == 3


def test_far_code_is_not_read_and_what_is_begins_with_a_line() -> None:
    filler = "".join(f"a_{at} = {at}\n" for at in range(5000))
    for extra in range(0, 2048, 64):
        before, memo = "f([\n" + filler + "#" * extra + "\nx = ", LexerMemo()
        guard = ScopeGuard("block", before, "", "a.py", memo)
        [(_, text, _)] = memo._known
        assert before.endswith("\n" + text + "x = ")
        read = len(text) + len("x = ")
        assert MAX_LOOK_CHARS - 20 <= read <= MAX_LOOK_CHARS + LOOK_STEP_CHARS
        assert guard.feed("1]\n") + guard.flush() == "1]"
    near = "f([\n" + filler[:4000]
    guard = ScopeGuard("block", near, "\n])", "a.py")
    assert guard.feed("1]\n") == "1"
    assert guard.stopped_by == "suffix"


def test_the_near_code_tells_the_style() -> None:
    before = "use a;\nfn f(x: &'a str) {\n    "
    assert run("scope", before, "b\n}\n\nc", "\n}\n") == ("b", "suffix")


def test_what_is_certain_is_shown_at_once() -> None:
    assert ScopeGuard("block", "", "").feed("  ") == "  "
    assert ScopeGuard("block", "f(", ")").feed("a ") == "a "
    assert ScopeGuard("scope", "x = ", "").feed("1\ny") == "1\ny"
    assert ScopeGuard("scope", "x = ", "= 1\n").feed("1\ny") == "1\ny"
    assert ScopeGuard("block", "", "= 1").feed("y") == "y"
    guard = ScopeGuard("block", "", "= 1")
    assert guard.feed("x = 1 ") == "x "
    assert guard.flush() == ""
    assert guard.stopped_by == "suffix"
    guard = ScopeGuard("block", "", "= 1")
    assert guard.feed("x =") + guard.flush() == "x ="
    assert guard.flush() == ""


def test_none_never_stops() -> None:
    answer = "a)\n}\n\n\nprint(x)\n"
    assert run("none", "f(", answer, ")\nprint(x)\n") == (answer, None)


def test_stops_at_the_first_character_that_tells() -> None:
    guard = ScopeGuard("scope", "def f():\n    ", "", "a.py")
    assert guard.feed("return 1\n\n") == "return 1"
    assert guard.stopped_by is None
    assert guard.feed("d") == ""
    assert guard.stopped_by == "scope"
    assert guard.feed("ef g()") + guard.flush() == ""


@pytest.mark.parametrize(
    ("code", "path"),
    [
        ("def f(x):\n    return x\n", "a.py"),
        ("const f = (x) => {\n", "a.ts"),
        ("fn f(x: &str) -> u8 {\n", "a.rs"),
        ("#include <a.h>\nint f() {\n", "a.c"),
        ("<div>\n  <p>a</p>\n", "a.html"),
        ("name: x\non: push\n", "a.yaml"),
    ],
)
def test_tells_the_style_without_a_path(code: str, path: str) -> None:
    assert style_of(None, code) == style_of(path, "")


CODE = st.text(alphabet="ab \n\r\t(){}[]:\"'`#/*\\", max_size=40)


@given(
    scope=st.sampled_from(get_args(StopScope)),
    before=CODE,
    answer=CODE,
    after=CODE,
    path=st.sampled_from([None, "a.py", "a.ts", "a.rs", "a.c", "a.html"]),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_chunking_never_changes_the_text(
    scope: StopScope, before: str, answer: str, after: str, path: str | None, cuts: list[int]
) -> None:
    whole, stopped_by = run(scope, before, answer, after, path)
    assert answer.startswith(whole)
    assert stopped_by is not None or whole == answer
    guard = ScopeGuard(scope, before, after, path)
    edges = sorted({0, len(answer), *(min(cut, len(answer)) for cut in cuts)})
    shown = "".join(guard.feed(answer[a:b]) for a, b in pairwise(edges)) + guard.flush()
    assert (shown, guard.stopped_by) == (whole, stopped_by)


@given(before=CODE, answer=CODE, after=CODE)
def test_a_line_has_one_line_of_text(before: str, answer: str, after: str) -> None:
    shown, _ = run("line", before, answer, after, "a.py")
    assert sum(bool(line.strip()) for line in shown.split("\n")) <= 1 + bool(
        before.rpartition("\n")[2].strip()
    )


@given(code=CODE, path=st.sampled_from(["a.py", "a.ts", "a.rs", "a.lua", "a.html"]))
def test_reading_in_runs_equals_reading_characters(code: str, path: str) -> None:
    one, many = _Lexer(style_of(path, "")), _Lexer(style_of(path, ""))
    for char in code:
        one.feed(char)
    many.read(code)
    assert vars(one) == vars(many)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_memo_changes_nothing(data: st.DataObject) -> None:
    pieces = ["def f(a,\n", "    x = (\n", '"""', "'", "#", "\n", "    ", "}", ")", "if a:\n", "1"]
    code = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=60)))
    after = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=6)))
    answer = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=10)))
    memo = LexerMemo()
    for end in (*range(0, len(code), 7), len(code), len(code) // 2):
        for scope in ("line", "block", "scope"):
            guards = [
                ScopeGuard(scope, code[:end], after, "a.py", each) for each in (None, memo, memo)
            ]
            shown = [guard.feed(answer) + guard.flush() for guard in guards]
            assert shown[0] == shown[1] == shown[2]
            assert guards[0].stopped_by == guards[1].stopped_by == guards[2].stopped_by


def test_a_memo_keeps_whole_lines_and_few_lexers() -> None:
    memo = LexerMemo()
    style = style_of("a.py", "")
    for end in ("", "x", "xy", "x"):
        assert memo.lexer(style, "a = (\nb\n" + end).line == 2
    assert [text for _, text, _ in memo._known] == ["a = (\nb\n"]
    memo.lexer(style, "a = (\nb\nc\nd")
    assert [text for _, text, _ in memo._known] == ["a = (\nb\n", "a = (\nb\nc\n"]
    for at in range(40):
        memo.lexer(style, f"{at}\n")
    assert len(memo._known) == LexerMemo.MAX_LEXERS


def test_a_memo_saves_reading() -> None:
    code = "def f():\n    x = [1, 2, (3, 4)]\n" * 150
    memo = LexerMemo()
    ScopeGuard("line", code, "", "a.py", memo)
    began = time.perf_counter()
    for at in range(50):
        ScopeGuard("line", code + "y" * at, "", "a.py", memo)
    with_memo = time.perf_counter() - began
    began = time.perf_counter()
    for at in range(50):
        ScopeGuard("line", code + "y" * at, "", "a.py")
    assert with_memo < (time.perf_counter() - began) / 3
