"""Rows of albor-bench gpu: printed and saved one by one, so that a run cut off keeps its own."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from albor_serve.errors import ConfigError

__all__ = ["GpuReport", "GpuRow", "write_json"]

_COLUMNS: Final = (
    f"{'engine':<15} {'what':<34} {'context':>7} {'batch':>5} {'rows':>4} {'time':>11} {'% bw':>5}"
)


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One measurement, or why there is none."""

    engine: str
    what: str
    """What was timed, for people, such as "token, graph"."""
    context: int = 0
    """Tokens in the cache before."""
    batch: int = 1
    """Sequences."""
    rows: int = 1
    """Tokens of each sequence that are computed at once."""
    us: float | None = None
    """Median time in µs; None where it failed."""
    read_bytes: int = 0
    """Bytes of weights and cache that it has to read at least; 0 where that is not its limit."""
    note: str = ""
    """What a reader must know; for a row without a time the reason."""

    def percent(self, bytes_per_s: float) -> float | None:
        """Part of the measured bandwidth that was used; above 100 where a cache holds the rest."""
        if self.us is None or not self.read_bytes or bytes_per_s <= 0:
            return None
        return 100 * self.read_bytes / bytes_per_s / (self.us * 1e-6)

    def line(self, bytes_per_s: float) -> str:
        """For a terminal."""
        if self.us is None:
            time = "failed"
        elif self.us < 2000:
            time = f"{self.us:.1f} µs"
        else:
            time = f"{self.us / 1000:.2f} ms"
        percent = self.percent(bytes_per_s)
        text = (
            f"{self.engine:<15} {self.what:<34} {self.context:>7} {self.batch:>5} {self.rows:>4} "
            f"{time:>11} {'' if percent is None else f'{percent:.0f}':>5}  {self.note}"
        )
        return text.rstrip()

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> GpuRow:
        """The inverse of dataclasses.asdict. Raises TypeError for other keys."""
        return cls(**value)


@dataclass(slots=True)
class GpuReport:
    """All rows so far. `add` prints a row and saves the file anew."""

    model: str
    command: str
    path: Path | None
    show: Callable[[str], None]
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[GpuRow] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float:
        """Measured bandwidth of the GPU's memory; 0 where it is not known."""
        return float(self.machine.get("bytes_per_s", 0.0))

    def set_machine(self, machine: Mapping[str, Any]) -> None:
        """What the rows were measured on."""
        self.machine = dict(machine)
        self.show(
            f"{self.model} on {machine.get('gpu')}: torch {machine.get('torch')}, "
            f"Triton {machine.get('triton')}, {self.bytes_per_s / 1e12:.2f} TB/s read"
        )
        self.show(_COLUMNS)
        self._save()

    def add(self, row: GpuRow) -> None:
        """Take a row. Raises ConfigError where the file can't be written."""
        self.rows.append(row)
        self.show(row.line(self.bytes_per_s))
        self._save()

    def ratios(self) -> list[str]:
        """One line for each peer: its time for a token over albor's, at equal contexts."""
        ours = {row.context: row.us for row in self.rows if _is_token(row, "albor") and row.us}
        lines = []
        for engine in dict.fromkeys(row.engine for row in self.rows):
            pairs = [
                f"{row.us / ours[row.context]:.1f} x at {row.context}"
                for row in self.rows
                if engine != "albor" and _is_token(row, engine) and row.us and row.context in ours
            ]
            if pairs:
                lines.append(f"{engine}: {', '.join(pairs)} tokens of context")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "command": self.command,
            "machine": self.machine,
            "rows": [asdict(row) | {"percent": row.percent(self.bytes_per_s)} for row in self.rows],
            "ratios": self.ratios(),
        }

    def plot(self, path: Path) -> None:
        """Bars: µs a token by engine and context, with the floor that bandwidth sets.

        Raises:
            ConfigError: matplotlib is missing, or does not know the file's ending.
        """
        from albor_serve.bench.report import load_pyplot, save_figure

        engines = dict.fromkeys(row.engine for row in self.rows)
        bars = [r for e in engines for r in self.rows if _is_token(r, e) and r.us is not None]
        pyplot = load_pyplot()
        figure, axis = pyplot.subplots(figsize=(6.4, 0.3 * len(bars) + 1.4))
        names = [f"{row.engine}, {row.context}" for row in bars]
        colours = ["#2a7f62" if row.engine == "albor" else "#9aa5ab" for row in bars]
        axis.barh(names, [row.us for row in bars], color=colours)
        floors = [row.read_bytes for row in bars if row.engine == "albor" and row.read_bytes]
        if floors and self.bytes_per_s:
            axis.axvline(
                min(floors) / self.bytes_per_s * 1e6, color="#c0392b", linestyle="--", linewidth=1
            )
        axis.invert_yaxis()
        axis.set_title(f"{self.model}, {self.machine.get('gpu', 'unknown GPU')}", fontsize=10)
        axis.set_xlabel("µs a token; dashed: weights and cache read once")
        axis.spines[["top", "right"]].set_visible(False)
        save_figure(path, figure)

    def _save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.as_dict())


def _is_token(row: GpuRow, engine: str) -> bool:
    """Whether a row is an engine's time for one token of one sequence."""
    is_one = row.batch == 1 and row.rows == 1
    return row.engine == engine and is_one and row.what.startswith("token")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write through a temporary file. Raises ConfigError where the folder can't be written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file") from error
    finally:
        temporary.unlink(missing_ok=True)
