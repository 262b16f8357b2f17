"""The cache finds what fits and nothing else."""

from __future__ import annotations

from dataclasses import replace

from albor_lsp.completion_cache import CompletionCache, Key
from hypothesis import given
from hypothesis import strategies as st

KEY = Key("file:///a.py", "1:m", 0, "\nrest", "")
short = st.text("ab\n", max_size=6)


def test_an_answer_is_found_while_typing_agrees_with_it() -> None:
    cache: CompletionCache[int] = CompletionCache()
    cache.put(KEY, "x = ", "foo(1)\n    bar", 7)
    assert cache.find(KEY, "x = ") == ("foo(1)\n    bar", 7)
    assert cache.find(KEY, "x = foo(1)\n  ") == ("  bar", 7)
    assert cache.find(KEY, "x = f", type_through=False) is None
    assert cache.find(KEY, "x = g") is None
    assert cache.find(KEY, "x =") is None
    assert cache.find(KEY, "x = foo(1)\n    bar") is None  # typed to its end


def test_nothing_stale_is_found() -> None:
    cache: CompletionCache[int] = CompletionCache()
    cache.put(KEY, "x", "y", 1)
    for other in (
        replace(KEY, uri="b"),
        replace(KEY, model="2:m"),
        replace(KEY, generation=1),
        replace(KEY, suffix=""),
        replace(KEY, scope="invoked"),
    ):
        assert cache.find(other, "x") is None


def test_the_least_recently_used_leave_first() -> None:
    cache: CompletionCache[int] = CompletionCache(max_places=2, max_answers=2)
    for at in range(3):
        cache.put(KEY, f"p{at}", "t", at)
    assert cache.find(KEY, "p0") is None
    assert cache.find(KEY, "p1") == ("t", 1)
    cache.put(KEY, "p3", "t", 3)
    assert cache.find(KEY, "p2") is None
    for at in range(3):
        cache.put(replace(KEY, uri=str(at)), "p", "t", at)
    assert cache.find(KEY, "p3") is None
    assert len(cache) == 2
    cache.drop("2")
    assert len(cache) == 1
    cache.clear()
    assert len(cache) == 0


@given(st.lists(st.tuples(short, short), max_size=8), short)
def test_whatever_is_found_completes_an_answer(answers: list[tuple[str, str]], prefix: str) -> None:
    cache: CompletionCache[int] = CompletionCache()
    for at, (before, text) in enumerate(answers):
        cache.put(KEY, before, text, at)
    found = cache.find(KEY, prefix)
    if found is not None:
        before, text = answers[found[1]]
        assert before + text == prefix + found[0]
    else:
        kept = dict(answers)
        assert not any(
            prefix.startswith(before)
            and (before + text).startswith(prefix)
            and len(prefix) < len(before + text)
            for before, text in kept.items()
        )
