"""Counts of suggestions, by day, on this machine alone."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

__all__ = ["Statistics", "as_svg", "as_text", "read_days", "statistics_path"]

COUNTS: Final = ("shown", "accepted", "chars_shown", "chars_accepted", "lines_accepted")
EDGES_MS: Final = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Upper ends of the latency classes; one more is open."""
MAX_DAYS: Final = 400
BAR_LEN: Final = 30

Days = dict[str, dict[str, Any]]


def statistics_path(environment: Mapping[str, str] | None = None) -> Path:
    """The file that holds the counts."""
    variables = os.environ if environment is None else environment
    base = variables.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "albor" / "statistics.json"


def read_days(path: Path) -> Days:
    """The counts by day (ISO date); empty where the file is missing or broken."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {day: _clean(counts) for day, counts in value.items() if isinstance(counts, dict)}


def _clean(counts: dict[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {name: _whole(counts.get(name)) for name in COUNTS}
    latency = counts.get("latency")
    classes = latency if isinstance(latency, list) else []
    clean["latency"] = [
        _whole(classes[at]) if at < len(classes) else 0 for at in range(len(EDGES_MS) + 1)
    ]
    return clean


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


@dataclass(slots=True)
class Statistics:
    """Counts of one run; `flush` adds them to the file, which windows share."""

    path: Path
    today: Callable[[], str] = lambda: time.strftime("%Y-%m-%d")
    _days: Days = field(default_factory=dict)

    def shown(self, text: str, latency_ms: float) -> None:
        """A new suggestion was offered."""
        counts = self._day()
        counts["shown"] += 1
        counts["chars_shown"] += len(text)
        place = sum(latency_ms > edge for edge in EDGES_MS)
        counts["latency"][place] += 1

    def accepted(self, text: str) -> None:
        """A suggestion was taken over."""
        counts = self._day()
        counts["accepted"] += 1
        counts["chars_accepted"] += len(text)
        counts["lines_accepted"] += text.count("\n") + 1

    def flush(self) -> None:
        """Write what was counted since the last time; does nothing where that is impossible."""
        if not self._days:
            return
        fresh, self._days = self._days, {}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                days = _sum(read_days(self.path), fresh)
                for day in sorted(days)[:-MAX_DAYS]:
                    del days[day]
                temporary = self.path.with_suffix(f".{os.getpid()}")
                try:
                    temporary.write_text(json.dumps(days), "utf-8")
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)

    def days(self) -> Days:
        """All that was counted, also what is not written yet."""
        return _sum(read_days(self.path), self._days)

    def _day(self) -> dict[str, Any]:
        return self._days.setdefault(self.today(), _clean({}))


def _sum(one: Days, other: Days) -> Days:
    days = dict(one)
    for day, counts in other.items():
        old = days.get(day, _clean({}))
        days[day] = {name: old[name] + counts[name] for name in COUNTS}
        days[day]["latency"] = [
            a + b for a, b in zip(old["latency"], counts["latency"], strict=True)
        ]
    return days


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a+") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def as_text(days: Days, num_days: int = 14) -> str:
    """A table of the last days and a bar chart of latencies, for a terminal or a page."""
    if not days:
        return "No suggestions counted yet.\n"
    total = _sum({}, {})
    for day, counts in days.items():
        total = _sum(total, {"all": counts})
        del day
    last = sorted(days)[-num_days:]
    lines = [f"{'day':<10}  shown  accepted     %  characters saved"]
    most = max(days[day]["chars_accepted"] for day in last) or 1
    for name, counts in [*((day, days[day]) for day in last), ("all days", total["all"])]:
        share = 100 * counts["accepted"] / max(counts["shown"], 1)
        saved = counts["chars_accepted"]
        bar = "" if name == "all days" else " " + "█" * round(BAR_LEN * saved / most)
        lines.append(
            f"{name:<10} {counts['shown']:>6} {counts['accepted']:>9} {share:>5.0f} {saved:>9}{bar}"
        )
    classes = total["all"]["latency"]
    most = max(classes) or 1
    lines += ["", "question to suggestion"]
    names = [f"≤ {edge} ms" for edge in EDGES_MS] + [f"> {EDGES_MS[-1]} ms"]
    for name, number in zip(names, classes, strict=True):
        if number:
            lines.append(f"{name:>9} {number:>6} {'█' * max(1, round(BAR_LEN * number / most))}")
    return "\n".join(lines) + "\n"


def as_svg(days: Days, num_days: int = 60) -> str:
    """A bar chart of characters saved by day."""
    last = sorted(days)[-num_days:]
    most = max((days[day]["chars_accepted"] for day in last), default=0) or 1
    width, height, step = 40 + 14 * max(len(last), 10), 200, 14
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="10">'
        ),
        f'<text x="4" y="12">characters saved by day (at most {most})</text>',
    ]
    for at, day in enumerate(last):
        tall = 150 * days[day]["chars_accepted"] / most
        parts.append(
            f'<rect x="{20 + at * step}" y="{180 - tall:.1f}" width="{step - 3}" '
            f'height="{tall:.1f}" fill="#2a7f62"><title>{escape(day)}: '
            f"{days[day]['chars_accepted']}</title></rect>"
        )
    if last:
        parts.append(f'<text x="20" y="194">{escape(last[0])} to {escape(last[-1])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
