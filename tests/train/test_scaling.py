from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albor_train.cli import main
from albor_train.errors import TrainingError
from albor_train.runs import Log
from albor_train.scaling import Law, Point, effective_tokens, fit, read_point, read_points, report
from albor_train.spec import load_spec, to_plain
from tests.train.fixtures_train import write_tiny_spec

TRUE = Law("true", 0.4, 60.0, 25.0, 0.34, 0.28, 0.0)
SIZES = (10e6, 40e6, 150e6)
BUDGETS = (1e8, 4e8, 2e9)


def made(law: Law, sizes: tuple[float, ...], budgets: tuple[float, ...]) -> list[Point]:
    return [Point(f"{n:g}-{d:g}", n, d, 1e12, law.loss(n, d)) for n in sizes for d in budgets]


def test_enough_runs_give_back_the_law() -> None:
    (law,) = fit(made(TRUE, SIZES, BUDGETS))
    assert law.source == "fitted"
    assert law.alpha == pytest.approx(TRUE.alpha, abs=0.011)
    assert law.beta == pytest.approx(TRUE.beta, abs=0.011)
    assert law.loss(400e6, 1e10) == pytest.approx(TRUE.loss(400e6, 1e10), rel=0.005)


@given(st.floats(0.1, 1.0), st.floats(0.02, 0.3))
def test_two_runs_give_floor_and_scale_of_a_published_law(floor: float, scale: float) -> None:
    true = Law("", floor, 406.4 * scale, 410.7 * scale, 0.34, 0.28, 0.0)
    points = [Point("a", 33e6, 4e8, 1e12, 0.0), Point("b", 150e6, 5e8, 1e12, 0.0)]
    points = [dataclasses.replace(p, loss=true.loss(p.parameters, p.tokens)) for p in points]
    laws = fit(points)
    assert len(laws) == 2
    assert laws[0].loss(4e8, 1e10) == pytest.approx(true.loss(4e8, 1e10), rel=1e-6)
    assert all(law.residual < 1e-6 for law in laws)


def test_constants_are_never_negative() -> None:
    """A larger run that is worse, as noise makes it, must not turn the law upside down."""
    points = [
        Point("a", 10e6, 1e8, 1e12, 0.60),
        Point("b", 40e6, 1e8, 1e12, 0.61),
        Point("c", 40e6, 9e8, 1e12, 0.50),
    ]
    for law in fit(points):
        assert min(law.floor, law.per_size, law.per_tokens) >= 0
        assert law.loss(80e6, 1e9) <= law.loss(40e6, 1e9)


@given(st.floats(1e6, 1e12), st.floats(1e6, 1e10))
def test_repeats_are_worth_less_than_fresh_text(tokens: float, unique: float) -> None:
    worth = effective_tokens(tokens, unique)
    assert worth <= tokens * (1 + 1e-12)
    assert worth <= 16.5 * unique
    if tokens <= unique:
        assert worth == tokens


def test_too_few_or_equal_runs_are_an_error() -> None:
    point = Point("a", 1e6, 1e8, 1e8, 1.0)
    for points in ([], [point], [point, point]):
        with pytest.raises(TrainingError, match="two at least"):
            fit(points)
    with pytest.raises(TrainingError, match="positive"):
        effective_tokens(0, 1)


def write_run(folder: Path, steps: int) -> Path:
    spec = load_spec(write_tiny_spec(folder))
    run = folder / "run"
    run.mkdir()
    (run / "spec.json").write_text(json.dumps({"hash": spec.hash, **to_plain(spec)}))
    log = Log(run / "log.jsonl", 0)
    for step in range(steps):
        log.write({"event": "step", "step": step})
    log.write({"event": "validation", "step": steps - 1, "left_to_right": 2.0, "fim": 2.1})
    log.close()
    return run


def test_a_runs_folder_is_a_point(tmp_path: Path) -> None:
    run = write_run(tmp_path, 20)
    before = sorted(run.iterdir())
    point = read_point(run, 4.0, 1e5)
    assert point.loss == pytest.approx(2.0 / math.log(2) / 4.0)
    assert point.tokens == 20 * 1024
    assert point.parameters == load_spec(tmp_path / "spec.yaml").model_config.num_parameters
    assert sorted(run.iterdir()) == before


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 20"):
        read_point(write_run(tmp_path, 19), 4.0, 1e5)


def test_files_of_points_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_text('{"points": [{"name": "a"}]}')
    with pytest.raises(TrainingError, match="unique_tokens"):
        read_points([path], 4.0, 1.0)
    with pytest.raises(TrainingError, match="no run"):
        read_points([tmp_path / "absent"], 4.0, 1.0)


def test_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [dataclasses.asdict(p) for p in made(TRUE, SIZES, BUDGETS)]
    path, picture = tmp_path / "points.json", tmp_path / "curve.svg"
    path.write_text(json.dumps({"points": rows}))
    arguments = ["scaling", str(path), "--predict", "400e6:10e9:200e6", "--plot", str(picture)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "| 400M on 10,000M | 400.0M | 10,000M | 200M |" in out
    assert picture.read_text().count("<circle") == 10
    assert main([*arguments[:3], "nonsense"]) == 1
    assert "PARAMETERS:TOKENS" in capsys.readouterr().err


def test_report_says_what_was_not_fitted() -> None:
    points = made(TRUE, SIZES[:1], BUDGETS[:2])
    text = report(points, fit(points), [])
    assert "2 runs do not determine them" in text
