"""Places behind the gate and beside the answer."""

from __future__ import annotations

import math

import pytest
from albor_lsp.beyond import places_beyond, turns
from hypothesis import given
from hypothesis import strategies as st

Tokens = list[tuple[str, float]]


def _tokens(*pairs: tuple[str, float]) -> Tokens:
    return [(text, math.log(chance)) for text, chance in pairs]


def _tops(*tops: dict[str, float]) -> list[dict[str, float]]:
    return [{text: math.log(chance) for text, chance in top.items()} for top in tops]


def test_an_answer_is_parted_at_its_unsure_tokens() -> None:
    tokens = _tokens(("a", 0.9), ("b", 0.1), ("c", 0.5), ("d", 0.2), ("e", 0.8))
    places = list(places_beyond(tokens, [], 0.3, is_whole=True))
    assert places == [("", "a"), ("ab", "c"), ("abcd", "e")]


def test_after_a_cut_answers_last_unsure_token_nothing_is_known() -> None:
    tokens = _tokens(("a", 0.9), ("b", 0.1), ("c", 0.5), ("d", 0.2), ("e", 0.8))
    places = list(places_beyond(tokens, [], 0.3, is_whole=False))
    assert places == [("", "a"), ("ab", "c")]


def test_two_unsure_tokens_leave_a_place_with_nothing() -> None:
    tokens = _tokens(("a", 0.1), ("b", 0.1), ("c", 0.5))
    places = list(places_beyond(tokens, [], 0.3, is_whole=True))
    assert places == [("", ""), ("a", ""), ("ab", "c")]


def test_an_unsure_last_token_says_nothing_of_what_follows() -> None:
    places = list(places_beyond(_tokens(("a", 0.9), ("b", 0.1)), [], 0.3, is_whole=True))
    assert places == [("", "a")]


@pytest.mark.parametrize(
    ("rivals", "typed"),
    [
        ({"value": 0.2, "other": 0.6}, "s"),
        ({"sum": 0.6, "value": 0.2}, "se"),
        ({"sent": 0.6, "value": 0.2}, "sel"),
        ({"selfish": 0.8}, None),
    ],
)
def test_so_much_of_a_token_as_rules_its_rivals_out(
    rivals: dict[str, float], typed: str | None
) -> None:
    tokens = _tokens(("self", 0.2), (".x", 0.9))
    tops = _tops({"self": 0.2, **rivals}, {".x": 0.9})
    places = dict(places_beyond(tokens, tops, 0.3, is_whole=True))
    assert places.pop("") == ""
    assert places.pop("self") == ".x"
    assert places == ({} if typed is None else {typed: "self"[len(typed) :] + ".x"})


def test_a_space_alone_rules_nothing_out() -> None:
    tokens = _tokens((" x1", 0.2), ("=", 0.9))
    tops = _tops({" x1": 0.2, "(": 0.8}, {"=": 0.9})
    assert (" x", "1=") in list(places_beyond(tokens, tops, 0.3, is_whole=True))


def test_what_no_listed_token_has_counts_in_part() -> None:
    tokens = _tokens(("ab", 0.05), ("c", 0.9))
    assert "a" not in dict(places_beyond(tokens, _tops({"ab": 0.05}), 0.3, is_whole=True))


def test_turns_are_the_likeliest_first() -> None:
    tokens = _tokens(("self", 0.5), (".x", 0.5))
    tops = _tops({"self": 0.5, "value": 0.1, "set": 0.2}, {".x": 0.5, ".y": 0.3, "(": 0.18})
    assert turns(tokens, tops, "a = ", 9) == ["set", "self.y", "v", "self("]
    assert turns(tokens, tops, "a = ", 2) == ["set", "self.y"]


def test_chances_of_the_same_turn_add_up() -> None:
    tops = _tops({"self": 0.5, "value": 0.1, "vector": 0.1, "other": 0.15})
    assert turns(_tokens(("self", 0.5)), tops, "", 9) == ["v", "o"]


def test_a_token_that_goes_on_or_ends_early_is_no_turn() -> None:
    tops = _tops({"self": 0.5, "selfish": 0.2, "se": 0.2})
    assert turns(_tokens(("self", 0.5)), tops, "", 9) == []


def test_unlikely_turns_are_left_out() -> None:
    tops = _tops({"self": 0.5, "value": 0.0099, "other": 0.0101})
    assert turns(_tokens(("self", 0.5)), tops, "", 9) == ["o"]


def test_alternatives_to_a_token_that_was_begun() -> None:
    tops = _tops({"lf": 0.5, " sent": 0.2, " set": 0.1})
    assert turns(_tokens(("lf", 0.5)), tops, "x = se", 9) == ["n", "t"]


CHANCES = st.floats(0.01, 1.0)


@given(
    st.lists(st.tuples(st.text("abc ", min_size=1, max_size=4), CHANCES), max_size=8),
    st.floats(0.0, 1.0),
    st.booleans(),
)
def test_a_place_and_what_follows_are_the_answer(
    pairs: list[tuple[str, float]], gate: float, is_whole: bool
) -> None:
    tokens = _tokens(*pairs)
    tops = [{text: value} for text, value in tokens]
    whole = "".join(text for text, _ in pairs)
    for typed, rest in places_beyond(tokens, tops, gate, is_whole=is_whole):
        assert whole.startswith(typed + rest)
