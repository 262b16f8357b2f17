from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albor_train.errors import EvaluationError
from albor_train.evaluate.scores import bootstrap_interval, edit_similarity, pass_at_k


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_pass(n: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    samples = [True] * passed + [False] * (n - passed)
    draws = list(itertools.combinations(samples, k))
    assert pass_at_k(n, passed, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_pass_at_k_refuses_what_is_not_defined() -> None:
    for arguments in ((1, 0, 10), (5, 6, 1), (5, -1, 1), (5, 2, 0)):
        with pytest.raises(EvaluationError):
            pass_at_k(*arguments)


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_edit_similarity(a: str, b: str) -> None:
    value = edit_similarity(a, b)
    assert 0 <= value <= 1
    assert value == edit_similarity(b, a)
    assert (value == 1) == (a == b)


def test_edit_similarity_counts_edits() -> None:
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)


def test_interval_holds_the_mean() -> None:
    low, high = bootstrap_interval([0.0, 1.0] * 50)
    assert 0.35 < low < 0.5 < high < 0.65
