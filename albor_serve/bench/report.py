"""Figures for people: a table, a plot; and JSON for later."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from albor_serve.bench.decode import DecodeSettings, EngineFigures, ModelFigures
from albor_serve.bench.machine import Machine
from albor_serve.errors import ConfigError

__all__ = [
    "decode_json",
    "load_pyplot",
    "plot_decode",
    "print_decode",
    "save_figure",
    "write_text",
]

OURS: Final = "albor"
FOREIGN_LIMIT: Final = 0.1
"""Cores that other programs may use before the figures are called into question."""
CPU_FEATURES: Final = (
    *("AVX", "AVX2", "AVX_VNNI", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"),
    *("AMX_INT8", "FMA", "F16C", "NEON", "DOTPROD", "MATMUL_INT8", "SVE"),
)
"""Of llama.cpp's list, what decides speed."""


def print_decode(
    console: Console, machine: Machine, models: Sequence[ModelFigures], settings: DecodeSettings
) -> None:
    """The table, ratios to each peer and the part of the physical limit beside every time."""
    console.print(
        f"{machine.cpu}, {settings.threads} threads, {machine.memory_gb:.0f} GB, "
        f"{machine.dram_gb_per_s:.1f} GB/s from memory; {machine.system}; commit {machine.commit}\n"
        f"prompt {settings.prompt_len} tokens, {settings.num_new} new, median of "
        f"{settings.repeats} interleaved rounds; ratio: albor's speed over the other's, +http "
        f"against +http\n{settings.command}".rstrip()
    )
    for model in models:
        table = Table(
            title=f"{model.name}: {model.file_bytes / 1e6:.1f} MB, reads at "
            f"{model.cache_gb_per_s:.1f} GB/s, limit {model.floor_ms(machine):.2f} ms/token",
            title_justify="left",
        )
        for heading in (
            "engine",
            "ms/token",
            "quartiles",
            "% of limit",
            "ratio",
            "prefill tok/s",
            "ratio",
            "first token, cold ms",
            "1 new token ms",
            "memory MB",
        ):
            name = heading == "engine"
            table.add_column(heading, justify="left" if name else "right", no_wrap=name)
        for engine in model.engines:
            table.add_row(*_cells(engine, model.ours(engine.kind), model.floor_ms(machine)))
        console.print(table)
        rows = "  ".join(f"{count}: {ms:.2f}" for count, ms in model.rows_ms.items())
        console.print(f"ms for k rows after {settings.prompt_len} tokens: {rows}")
        for line in _doubts(model):
            console.print(f"[yellow]{line}")
        console.print()


def _doubts(model: ModelFigures) -> list[str]:
    """What a reader must know before believing the table."""
    lines = []
    foreign = model.foreign_cores
    if foreign is not None and foreign.median > FOREIGN_LIMIT:
        lines.append(
            f"Other programs used {foreign.median:.1f} cores (quartiles {foreign.low:.1f} to "
            f"{foreign.high:.1f}) meanwhile: close them and repeat."
        )
    lines += [
        f"{engine.kind} used {engine.idle_cores:.1f} cores while others had their turn."
        for engine in model.engines
        if engine.idle_cores > FOREIGN_LIMIT
    ]
    ours = model.figures(OURS)
    mine = set(ours.build.split()) if ours else set()
    for engine in model.engines:
        missing = sorted(mine.intersection(CPU_FEATURES) - set(engine.build.split()))
        if engine.build and missing:
            lines.append(
                f"{engine.kind} was compiled without {' '.join(missing)}, which albor's llama.cpp "
                f"uses: part of the ratio is the compiler's."
            )
    return lines


def _cells(engine: EngineFigures, ours: EngineFigures | None, floor_ms: float) -> list[str]:
    decode, prefill = engine.decode_ms, engine.prefill_tokens_per_s
    return [
        engine.kind,
        f"{decode.median:.2f}",
        f"{decode.low:.2f}-{decode.high:.2f}",
        f"{100 * floor_ms / decode.median:.0f}",
        f"{decode.median / ours.decode_ms.median:.2f}" if ours else "",
        f"{prefill.median:.0f}",
        f"{ours.prefill_tokens_per_s.median / prefill.median:.2f}" if ours else "",
        f"{engine.cold_first_token_ms.median:.0f}",
        f"{engine.cached_first_token_ms.median:.1f}",
        f"{engine.rss_bytes / 1e6:.0f}",
    ]


def decode_json(
    machine: Machine, models: Sequence[ModelFigures], settings: DecodeSettings
) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "machine": machine.as_dict(),
        "settings": asdict(settings),
        "models": [asdict(model) | {"floor_ms": model.floor_ms(machine)} for model in models],
    }


def write_text(path: Path, value: dict[str, Any]) -> None:
    """Write JSON through a temporary file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plot_decode(path: Path, machine: Machine, models: Sequence[ModelFigures]) -> None:
    """Bars of ms/token for each model and engine, the physical limit as a line; PNG or SVG.

    Raises:
        ConfigError: matplotlib is missing or does not know the file's ending.
    """
    pyplot = load_pyplot()
    num_bars = max(len(model.engines) for model in models)
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(4.2 * len(models) + 0.4, 0.3 * num_bars + 1.4), squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        names = [engine.kind for engine in model.engines]
        stats = [engine.decode_ms for engine in model.engines]
        spread = [[s.median - s.low for s in stats], [s.high - s.median for s in stats]]
        colours = ["#2a7f62" if name.startswith(OURS) else "#9aa5ab" for name in names]
        axis.barh(names, [s.median for s in stats], xerr=spread, color=colours, capsize=3)
        axis.axvline(model.floor_ms(machine), color="#c0392b", linewidth=1, linestyle="--")
        axis.invert_yaxis()
        axis.set_title(model.name, fontsize=10)
        axis.set_xlabel("ms per token")
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("dashed: weights read once at the measured bandwidth", fontsize=8)
    save_figure(path, figure)


def load_pyplot() -> Any:
    """Matplotlib's pyplot, for files alone.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'albor[bench]', or leave it out"
        ) from error
    return pyplot


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure of `load_pyplot` and close it.

    Raises:
        ConfigError: matplotlib does not know the file's ending.
    """
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"cannot write a plot to {path.name}: use .png or .svg") from error
    finally:
        load_pyplot().close(figure)
