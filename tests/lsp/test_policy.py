import pytest
from albor_lsp.policy import Debounce, should_ask


@pytest.mark.parametrize(
    ("before", "after", "language", "ask", "scope"),
    [
        ("fo", "o = 1", "python", False, "none"),
        ("", "", "python", False, "none"),
        ("x = ", "\n", "python", True, "line"),
        ("def f(x):\n    ", "\n", "python", True, "scope"),
        ("def f(x):\n    ", "\n    return 1\n", "python", True, "block"),
        ("for x in y:\n    ", "\n", "python", True, "block"),
        ("    pass", "\n", "python", False, "none"),
        ("# the sum of", "\n", "python", True, "line"),
        ('"""The sum', "\n", "python", True, "line"),
        ("int x = 1;", "\n", "c", False, "none"),
        ("func f() {\n\t", "\n}", "go", True, "scope"),
        ("fn f<'a>(x: &'a str) {\n    ", "\n}", "rust", True, "scope"),
        ("if (x > 0) {", "\n", "c", True, "block"),
        ("call(", "\n", "c", True, "line"),
        ("values = [", "\n", "javascript", True, "line"),
        ("if x {", " y }\n", "rust", True, "line"),
        ("// the sum", "\n", "typescript", True, "line"),
        ("f(", ", b)", "javascript", True, "line"),
        ("<!-- note", "\n", "html", True, "line"),
        ("key: ", "\n", "yaml", True, "line"),
        ("Some words", "\n", "markdown", True, "line"),
    ],
)
def test_cases(before: str, after: str, language: str, ask: bool, scope: str) -> None:
    decision = should_ask(before, after, language, False)
    assert (decision.ask, decision.stop_scope) == (ask, scope), decision
    assert should_ask(before, after, language, True).ask


def test_prose_is_shorter() -> None:
    comment = should_ask("# sum", "", "python", False)
    assert comment.max_tokens < should_ask("x = ", "", "python", False).max_tokens
    assert should_ask("x = 'it''s' # ", "", "python", False).reason == "comment"
    assert should_ask("x = '#'", "", "python", False).reason != "comment"


def test_debounce() -> None:
    debounce = Debounce()
    assert debounce.delay_ms() == 0
    debounce.observe(60, False)
    assert debounce.delay_ms() == 0
    for _ in range(20):
        debounce.observe(2000, True)
    assert debounce.delay_ms() == 300
