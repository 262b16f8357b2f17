from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from albor_train.errors import TrainingError
from albor_train.monitor import Monitor, write_report
from albor_train.runs import Log
from albor_train.train import StepRecord


def record(step: int) -> StepRecord:
    return StepRecord(
        step, 5.0 / (step + 1), 1e-3, 1.5, 1.0, 100 * step, step, 0.1, 1000.0, 0.4, 1 << 30
    )


def test_report_has_the_curves(tmp_path: Path) -> None:
    from dataclasses import asdict

    log = Log(tmp_path / "log.jsonl", 0)
    for step in range(50):
        log.write({"event": "step", **asdict(record(step))})
    log.write({"event": "validation", "step": 49, "fim": 1.25})
    log.write({"event": "stopped", "step": 50, "reason": "the loss <is> nan"})
    log.close()
    write_report(tmp_path, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 5
    assert "1.2500" in text
    assert "the loss &lt;is&gt; nan" in text
    assert "<script" not in text


def test_no_steps_no_report(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no steps"):
        write_report(tmp_path, tmp_path / "report.html")


def test_log_drops_what_a_resume_does_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    for step in range(5):
        log.write({"step": step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    log = Log(path, 3)
    log.write({"step": 3})
    log.close()
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize("terminal", [True, False])
def test_monitor_shows_loss_speed_and_end(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Monitor(3, console) as monitor:
        for step in range(3):
            monitor.on_step(record(step))
    text = out.getvalue()
    assert "1.6667" in text
    assert "1,000 tokens/s" in text
    assert "40.0%" in text
