from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albor_serve.speculate import Draft, DraftPolicy, lookup_text, propose
from tests.fakes import LinearCosts


def naive(history: list[int], limit: int) -> tuple[list[int], int]:
    for size in (4, 3, 2):
        for end in range(len(history) - 1, size - 1, -1):
            if size < len(history) and history[end - size : end] == history[-size:]:
                return history[end : end + limit], size
    return [], 0


@given(st.lists(st.integers(0, 2), max_size=25), st.integers(0, 6))
def test_propose_is_the_latest_longest_match(history: list[int], limit: int) -> None:
    draft = propose(np.array(history, dtype=np.int32), limit)
    if limit == 0:
        assert draft == Draft((), 0)
        return
    tokens, match_len = naive(history, limit)
    assert (list(draft.tokens), draft.match_len) == (tokens, match_len)


def test_free_rows_draft_everything_and_dear_rows_nothing() -> None:
    draft = Draft((1, 2, 3, 4), 4)
    assert DraftPolicy(LinearCosts(1.0, 0.0)).num_to_verify(draft) == 4
    assert DraftPolicy(LinearCosts(0.0, 1.0)).num_to_verify(draft) == 0
    assert DraftPolicy(LinearCosts(1.0, 0.0)).num_to_verify(Draft((), 0)) == 0


def test_the_best_number_is_between_when_rows_cost_a_little() -> None:
    policy = DraftPolicy(LinearCosts(1.0, 0.3))
    assert 0 < policy.num_to_verify(Draft(tuple(range(8)), 4)) < 8


def test_learns_from_guesses_and_recovers() -> None:
    policy = DraftPolicy(LinearCosts(1.0, 0.5))
    draft = Draft((1, 2, 3), 4)
    assert policy.num_to_verify(draft) > 0
    for _ in range(100):
        policy.observe(draft, False)
    assert policy.acceptance(4) < 0.2
    assert policy.num_to_verify(draft) == 0
    for _ in range(200):
        policy.observe(draft, True)
    assert policy.acceptance(4) == pytest.approx(1.0, abs=0.05)
    assert policy.num_to_verify(draft) == 3
    assert policy.acceptance(2) == pytest.approx(0.35)


def test_an_empty_draft_teaches_nothing() -> None:
    policy = DraftPolicy(LinearCosts())
    policy.observe(Draft((), 0), True)
    assert policy.acceptance(2) == pytest.approx(0.35)


def test_measured_steps_correct_the_calibration() -> None:
    draft = Draft((1, 2, 3, 4), 4)
    policy = DraftPolicy(LinearCosts(1.0, 0.0))
    assert policy.num_to_verify(draft) == 4
    for _ in range(60):
        policy.observe_step(1, 1.0)
        policy.observe_step(5, 20.0)  # several rows turn out to be dear
    assert policy.num_to_verify(draft) == 0
    for _ in range(60):
        policy.observe_step(1, 20.0)  # everything has become slow alike
    assert policy.num_to_verify(draft) == 4


def test_given_drafts_are_found_after_the_prompt_and_again_after_a_detour() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    drafts = [[10, 11, 12, 13], [20, 21]]
    text = lookup_text(prompt, drafts)
    assert text.tolist() == [3, 4, 5, 6, 10, 11, 12, 13, 3, 4, 5, 6, 20, 21]
    assert text.dtype == np.int32
    history = np.array([*text, *prompt], dtype=np.int32)
    # Of two drafts after the same prompt the last one is the latest match.
    assert list(propose(history, 4).tokens)[:2] == [20, 21]
    came_back = np.array([*text, *prompt, 7, 10, 11], dtype=np.int32)
    assert list(propose(came_back, 2).tokens) == [12, 13]
    assert lookup_text(prompt, []).size == 0


def test_four_agreeing_tokens_are_as_good_as_five() -> None:
    history = [1, 2, 3, 4, 5, 7, 0, 2, 3, 4, 5, 8, 1, 2, 3, 4, 5]
    assert propose(np.array(history, dtype=np.int32), 1) == Draft((8,), 4)


class _Steep:
    """Two rows are as cheap as one, three are not."""

    prefill_ms_per_token = 1.0

    def ms(self, rows: int) -> float:
        return 1.0 if rows <= 2 else 100.0


def test_the_cost_of_a_draft_is_that_of_its_tokens_and_one_more_row() -> None:
    assert DraftPolicy(_Steep()).num_to_verify(Draft((1,), 4)) == 1
    assert DraftPolicy(_Steep()).num_to_verify(Draft((1, 2, 3), 4)) == 1


def test_a_measured_step_moves_the_costs_a_tenth_of_the_way() -> None:
    # One row costs 2 ms and two cost 4; the second of 4 is accepted with 0.75.
    policy = DraftPolicy(LinearCosts(0.0, 2.0))
    draft = Draft((1,), 4)
    assert policy.num_to_verify(draft) == 0
    policy.observe_step(2, 4.0)  # as calibrated
    assert policy._several_factor == pytest.approx(1.0)
    policy.observe_step(1, 4.0)
    assert policy._single_factor == pytest.approx(1.1)
    policy.observe_step(2, 1.0)
    assert policy._several_factor == pytest.approx(0.925)
    for _ in range(60):
        policy.observe_step(2, 2.0)
    assert policy.num_to_verify(draft) == 1
