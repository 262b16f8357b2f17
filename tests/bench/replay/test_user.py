from __future__ import annotations

import pytest

from albor_serve.bench.replay.clients.base import EditorState
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.scenes import Scene
from albor_serve.bench.replay.typist import FAST, NORMAL
from albor_serve.bench.replay.user import Person, acceptable_len
from tests.bench.replay.fakes import ScriptedClient, in_loop, scene, virtual_clock


async def write(
    clock: Clock, client: ScriptedClient, one: Scene, typist: object = NORMAL
) -> Person:
    person = Person(one, client, typist, clock, seed=0)  # type: ignore[arg-type]
    async with clock:
        await person.write()
    return person


def rest_of(one: Scene) -> object:
    def suggest(state: EditorState) -> str:
        return one.typed[len(state.before) - one.start :]

    return suggest


@in_loop
async def test_without_suggestions_every_key_is_typed() -> None:
    one = scene("value = 1\n    more")
    clock = virtual_clock()
    client = ScriptedClient(clock, lambda state: "")
    trace = (await write(clock, client, one)).trace
    assert trace.num_keys == len(trace.keystrokes) == 14
    assert (trace.num_shown, trace.num_accepted, trace.num_keys_saved) == (0, 0, 0)
    assert [s.shown_s for s in trace.keystrokes] == [None] * 14
    last = client.states[-1]
    assert last.before + last.after == one.source.text


@in_loop
async def test_a_right_suggestion_is_accepted_after_the_reaction_time() -> None:
    one = scene("result = compute_everything(first, second)")
    clock = virtual_clock()
    client = ScriptedClient(clock, rest_of(one))  # type: ignore[arg-type]
    trace = (await write(clock, client, one)).trace
    assert (trace.num_accepted, trace.num_wrong) == (1, 0)
    [accepted] = client.accepted
    assert accepted.before + accepted.after == one.source.text
    first_shown = trace.keystrokes[0].shown_s
    assert first_shown is not None
    assert first_shown - trace.keystrokes[0].pressed_s == pytest.approx(0.05)
    assert 0.25 <= trace.keystrokes[-1].pressed_s - first_shown <= 0.4
    # Keys pressed while the person made up their mind agreed with the text and kept it.
    meanwhile = trace.keystrokes[1:-1]
    assert all(stroke.is_kept for stroke in meanwhile)
    assert trace.num_keys_saved == trace.num_keys - len(trace.keystrokes)


@in_loop
async def test_a_wrong_suggestion_is_typed_over() -> None:
    one = scene("alpha = beta")
    clock = virtual_clock()
    client = ScriptedClient(clock, lambda state: "nonsense()")
    trace = (await write(clock, client, one)).trace
    assert trace.num_accepted == 0
    assert trace.num_wrong == trace.num_shown > 0
    assert trace.num_keys_saved == 0


@in_loop
async def test_an_answer_for_an_older_text_is_not_shown() -> None:
    one = scene("abcdefgh")
    clock = virtual_clock()
    client = ScriptedClient(clock, rest_of(one), delay_s=60.0)  # type: ignore[arg-type]
    trace = (await write(clock, client, one, FAST)).trace
    assert trace.num_shown == 0


@in_loop
async def test_only_the_first_line_is_taken_where_the_second_is_wrong() -> None:
    one = scene("first_line = 1\n    second_line = 2")
    clock = virtual_clock()

    def suggest(state: EditorState) -> str:
        typed = state.before[one.start :]
        return "first_line = 1\n    wrong"[len(typed) :] if len(typed) < 5 else ""

    client = ScriptedClient(clock, suggest)
    trace = (await write(clock, client, one)).trace
    assert client.accepted[0].before.endswith("first_line = 1")
    assert (trace.num_accepted, trace.num_wrong) == (1, 0)


@in_loop
async def test_an_editor_that_clears_ghost_text_gets_it_again_or_loses_it() -> None:
    one = scene("result = compute_everything(first, second)")
    clock = virtual_clock()
    client = ScriptedClient(clock, rest_of(one), delay_s=0.001)  # type: ignore[arg-type]
    client.editor_keeps_ghost = False
    trace = (await write(clock, client, one)).trace
    # Offered anew after each key: one suggestion to the person, whose reaction goes on.
    assert (trace.num_shown, trace.num_accepted) == (1, 1)
    assert all(stroke.is_kept for stroke in trace.keystrokes[1:-1])


@in_loop
async def test_deleted_text_is_gone_before_the_first_key() -> None:
    one = scene("x is not None", before="if ", after=":\n", old="x is None")
    clock = virtual_clock()
    client = ScriptedClient(clock, lambda state: "")
    await write(clock, client, one)
    assert (client.states[0].before, client.states[0].after) == ("if ", ":\n")


@in_loop
async def test_typing_is_the_same_whatever_the_client_shows() -> None:
    one = scene("alpha = beta")
    times = []
    for text in ("", "nonsense()"):
        clock = virtual_clock()
        client = ScriptedClient(clock, lambda state, text=text: text)  # type: ignore[misc]
        trace = (await write(clock, client, one)).trace
        times.append([round(stroke.pressed_s, 9) for stroke in trace.keystrokes])
    assert times[0] == times[1]


@pytest.mark.parametrize(
    ("ghost", "remaining", "expected"),
    [
        ("abc", "abcdef", 3),
        ("abcd  ", "abcd", 4),
        ("ab", "abcdef", 0),  # too short to be worth a key
        ("abx", "abcdef", 0),
        ("abcdef", "abc", 0),
        ("abc\nx", "abc\ny", 3),
        ("\n    abc\nx", "\n    abc\ny", 8),
        ("", "abc", 0),
    ],
)
def test_what_is_acceptable(ghost: str, remaining: str, expected: int) -> None:
    assert acceptable_len(ghost, remaining) == expected
