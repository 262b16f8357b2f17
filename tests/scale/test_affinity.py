"""Sessions keep their replica as long as it lives."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from albor_serve.scale.affinity import ranked

names = st.sets(st.text(max_size=8), min_size=1, max_size=8)


@given(st.text(max_size=20), names)
def test_the_order_is_a_permutation_that_depends_on_the_names_alone(
    session: str, replicas: set[str]
) -> None:
    order = ranked(session, replicas)
    assert sorted(order) == sorted(replicas)
    assert ranked(session, sorted(replicas, reverse=True)) == order


@given(st.text(max_size=20), names, st.data())
def test_a_death_moves_only_the_sessions_of_the_dead(
    session: str, replicas: set[str], data: st.DataObject
) -> None:
    dead = data.draw(st.sampled_from(sorted(replicas)))
    order = ranked(session, replicas)
    assert ranked(session, replicas - {dead}) == [name for name in order if name != dead]


def test_sessions_spread_evenly() -> None:
    counts = Counter(ranked(f"editor-{i}", ("a", "b", "c", "d"))[0] for i in range(4000))
    assert all(900 < count < 1100 for count in counts.values())
