import pytest
from albor_lsp.tidy import Indent, detect_indent, tidy
from hypothesis import given
from hypothesis import strategies as st

SPACES = Indent()


@pytest.mark.parametrize(
    ("text", "before", "after", "shown"),
    [
        ("a, b)", "f(", ")\n", "a, b"),
        ("return total", "    ", "\n    return total\n", None),
        ("x = 1\n    return total", "    ", "\n    return total\n", "x = 1"),
        ("x = 1  \n\n", "", "\n", "x = 1"),
        ("run()\nrun()\nrun()", "", "", "run()"),
        ("y\n}\n}", "fn f() {\n  ", "\n}\n", "y"),
        ("   ", "", "", None),
        ("name</b>", "<b>", "</b>\n", "name"),
        ("name: 2", "a: 1\n", "\nname: 2\n", None),
    ],
)
def test_cases(text: str, before: str, after: str, shown: str | None) -> None:
    assert tidy(text, before, after, SPACES) == shown


def test_indentation_follows_the_file() -> None:
    assert tidy("if x {\n    y()\n}", "\t", "", Indent(True, 4)) == "if x {\n\ty()\n}"
    assert tidy("if x:\n\ty()", "", "", SPACES) == "if x:\n    y()"
    assert detect_indent("a {\n\tb\n}") == Indent(True, 4)
    assert detect_indent("a:\n  b\n") == Indent(False, 2)


CODE = st.text(alphabet="abc(){}[];\n \t.", max_size=60)


@given(CODE, CODE, CODE)
def test_never_repeats_what_follows(text: str, before: str, after: str) -> None:
    shown = tidy(text, before, after, SPACES)
    if shown is None:
        return
    assert shown == shown.rstrip()
    assert shown.strip()
    rest = after.split("\n")[0].rstrip()
    assert not rest.strip() or not shown.endswith(rest)
    following = [line.rstrip() for line in after.split("\n")[1:] if line.strip()]
    if following and sum(map(str.isalnum, following[0])) >= 3:
        assert following[0] not in shown.split("\n")[1:]
    assert tidy(shown, before, after, SPACES) == shown


def test_a_model_that_has_lost_its_way_is_cut() -> None:
    looped = "join(" + "os.path.abspath(" * 5
    assert tidy(looped, "x = ", "\n", Indent()) == "join"
    assert tidy("os.path.abspath(" * 3, "x = ", "\n", Indent()) is None
    for fine in ("# " + "=" * 60, "[0, 0, 0, 0, 0, 0, 0, 0, 0]", "abcabcabc"):
        assert tidy(fine, "", "\n", Indent()) == fine
