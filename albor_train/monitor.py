"""Watch a run: a live view in the terminal, and a report as one HTML file."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from albor_train.errors import TrainingError
from albor_train.runs import read_log
from albor_train.train import StepRecord

__all__ = ["Monitor", "write_report"]

_SPARKS: Final = "▁▂▃▄▅▆▇█"


class Monitor:
    """Prints a run's progress: a table that stays in place on a terminal, else a line at times."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._total = total_steps
        self._console = console or Console(stderr=True)
        self._losses: list[float] = []
        self._live: Live | None = None
        self._began = time.monotonic()
        self._printed = -1e9

    def __enter__(self) -> Monitor:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_step(self, record: StepRecord) -> None:
        """Show one step."""
        self._losses.append(record.loss)
        if self._live is not None:
            self._live.update(self._table(record))
        elif time.monotonic() - self._printed > 5 or record.step + 1 == self._total:
            self._printed = time.monotonic()
            self._console.print(
                f"step {record.step + 1}/{self._total}  loss {record.loss:.4f}  "
                f"lr {record.lr:.2e}  norm {record.grad_norm:.2f}  "
                f"{record.tokens_per_s:,.0f} tokens/s  MFU {record.mfu:.1%}  "
                f"{record.memory_bytes / 2**30:.1f} GiB",
                highlight=False,
                soft_wrap=True,
            )

    def _table(self, record: StepRecord) -> Table:
        table = Table.grid(padding=(0, 2))
        left = (self._total - record.step - 1) * record.seconds
        rows = [
            ("step", f"{record.step + 1} of {self._total}, {left / 60:.1f} min left"),
            ("loss", f"{record.loss:.4f}  {_spark(self._losses, 48)}"),
            ("learning rate", f"{record.lr:.3e}"),
            ("gradient norm", f"{record.grad_norm:.3f}, clipped to {record.clipped_norm:.3f}"),
            ("speed", f"{record.tokens_per_s:,.0f} tokens/s, MFU {record.mfu:.1%}"),
            ("memory", f"{record.memory_bytes / 2**30:.1f} GiB"),
            ("tokens", f"{record.tokens / 1e6:.1f}M, row {record.row}"),
        ]
        for name, value in rows:
            table.add_row(name, value)
        return table


def _spark(values: Sequence[float], width: int) -> str:
    step = max(1, len(values) // width)
    points = [
        sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)
    ]
    low, high = min(points), max(points)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[int((point - low) * scale)] for point in points[-width:])


def write_report(run: Path, out: Path) -> None:
    """One HTML file with the run's curves; no scripts, no outside files.

    Raises:
        TrainingError: the run has no steps yet.
    """
    log = run / "log.jsonl"
    lines = read_log(log) if log.exists() else []
    steps = [line for line in lines if line["event"] == "step"]
    if not steps:
        raise TrainingError(f"{run} has no steps to report: train first")
    validation = [line for line in lines if line["event"] == "validation"]
    names = sorted({k for line in validation for k in line if k not in ("event", "step")})
    curves: list[tuple[str, list[tuple[str, list[tuple[float, float]]]]]] = [
        (
            "loss, nats for each token",
            [
                ("training", _smooth([(s["step"], s["loss"]) for s in steps])),
                *(
                    (name, [(v["step"], v[name]) for v in validation if name in v])
                    for name in names
                ),
            ],
        ),
        ("learning rate", [("lr", [(s["step"], s["lr"]) for s in steps])]),
        (
            "gradient norm",
            [
                ("before clipping", [(s["step"], s["grad_norm"]) for s in steps]),
                ("after", [(s["step"], s["clipped_norm"]) for s in steps]),
            ],
        ),
        ("tokens a second", [("", [(s["step"], s["tokens_per_s"]) for s in steps])]),
        ("MFU", [("", [(s["step"], s["mfu"]) for s in steps])]),
    ]
    last = steps[-1]
    facts: list[tuple[str, str]] = [
        ("steps", f"{last['step'] + 1:,}"),
        ("tokens", f"{last['tokens']:,}"),
        ("last loss", f"{last['loss']:.4f}"),
        ("seconds in steps", f"{sum(s['seconds'] for s in steps):,.0f}"),
        ("peak memory", f"{max(s['memory_bytes'] for s in steps) / 2**30:.1f} GiB"),
    ]
    facts += [(f"validation, {name}", f"{validation[-1][name]:.4f}") for name in names]
    facts += [("stopped", line["reason"]) for line in lines if line["event"] == "stopped"]
    body = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts)
    charts = "".join(f"<h2>{html.escape(t)}</h2>{_chart(series)}" for t, series in curves)
    style = (
        "body{font:15px system-ui;max-width:820px;margin:2em auto;padding:0 1em}"
        "td{padding:2px 16px 2px 0}svg{width:100%;height:auto}text{font-size:11px}"
    )
    out.write_text(
        f"<!doctype html><meta charset=utf-8><title>{html.escape(run.name)}</title>"
        f"<style>{style}</style><h1>{html.escape(run.name)}</h1><table>{body}</table>{charts}\n",
        "utf-8",
    )


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over at most 400 stretches."""
    step = max(1, len(points) // 400)
    return [
        (points[min(i + step, len(points)) - 1][0], _mean([y for _, y in points[i : i + step]]))
        for i in range(0, len(points), step)
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


_COLOURS: Final = ("#2563eb", "#dc2626", "#059669", "#9333ea")


def _chart(series: list[tuple[str, list[tuple[float, float]]]]) -> str:
    width, height, left, bottom = 800, 260, 64, 24
    points = [point for _, line in series for point in line]
    if not points:
        return "<p>no data</p>"
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / x_span * (width - left - 8),
            8 + (y_high - y) / y_span * (height - bottom - 8),
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for i in range(5):
        value = y_low + y_span * i / 4
        _, y = place(x_low, value)
        parts.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="0" y="{y + 4:.1f}">{value:.4g}</text>')
    for number, (name, line) in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        parts.append(
            f'<text x="{width - 160}" y="{20 + 14 * number}" fill="{colour}">'
            f"{html.escape(name)}</text>"
        )
    parts.append(f'<text x="{left}" y="{height - 4}">{x_low:g}</text>')
    parts.append(f'<text x="{width - 60}" y="{height - 4}">{x_high:g}</text></svg>')
    return "".join(parts)
