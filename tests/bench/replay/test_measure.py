from __future__ import annotations

import pytest

from albor_serve.bench.replay.clients.base import RequestRecord, Work
from albor_serve.bench.replay.measure import figures_of, percentile
from albor_serve.bench.replay.servers import Totals
from albor_serve.bench.replay.user import Keystroke, SceneTrace


def trace() -> SceneTrace:
    strokes = [
        Keystroke(0.0, shown_s=0.1),
        Keystroke(1.0, shown_s=1.0, is_kept=True, had_ghost=True),
        Keystroke(2.0, had_ghost=True),
        Keystroke(3.0),
        Keystroke(4.0, shown_s=4.3),
    ]
    return SceneTrace("demo", "line", 20, strokes, 10, 2, 1, 1, 5.0)


def test_figures() -> None:
    work = Work(2, 0, [RequestRecord(500, 490, 10, is_shown=True), RequestRecord(501, 2, 30)])
    figures = figures_of("demo", [trace(), trace()], work)
    assert figures.ghost_ms == pytest.approx([100, 300] * 2)  # kept text is not in it
    assert figures.num_keys == 10
    assert figures.percent_covered == 60
    assert figures.percent_type_through == 50
    assert figures.percent_saved == 50
    assert (figures.num_shown, figures.num_accepted, figures.num_wrong) == (4, 2, 2)
    assert figures.new_prompt_per_key == pytest.approx(49.2)
    assert figures.percent_decode_wasted == 75
    assert figures.median_new_prompt == 246


def test_cancelled_work_is_known_from_the_servers_counters_alone() -> None:
    work = Work(3, 1, [RequestRecord(500, 490, 10, is_shown=True)])
    unknown = figures_of("demo", [trace()], work)
    assert unknown.new_prompt_per_key is None
    assert unknown.percent_decode_wasted is None
    told = figures_of("demo", [trace()], work, Totals(1000, 100), Totals(2000, 140))
    assert told.new_prompt_per_key == 200
    assert told.percent_decode_wasted == 75


def test_nothing_shown() -> None:
    figures = figures_of("demo", [SceneTrace("demo", "line", 3)], Work())
    assert figures.ghost_percentile(50) is None
    assert figures.percent_type_through is None
    assert figures.percent_covered == 0


def test_percentile() -> None:
    assert percentile([4.0, 1.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0
    assert percentile(range(101), 95) == 95
