"""The replay's figures for people: a table, JSON, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from albor_serve.bench.machine import Machine
from albor_serve.bench.replay.measure import ClientFigures
from albor_serve.bench.replay.run import ReplaySettings
from albor_serve.bench.report import load_pyplot, save_figure

__all__ = ["best_peer", "plot_replay", "print_replay", "replay_json"]

OURS: Final = "albor"
PEERS: Final = "llama"


def print_replay(
    console: Console,
    machine: Machine,
    figures: Sequence[ClientFigures],
    settings: ReplaySettings,
) -> None:
    """What was measured on what, a row for each figure, and our ratio to the best peer."""
    first = figures[0]
    waiting = "idle pauses skipped" if settings.skip_idle else "in real time"
    chosen = " (albor-serve: its own choice)" if settings.options.albor_chooses_threads else ""
    console.print(
        f"{machine.cpu}, {settings.options.threads} threads{chosen}, {machine.memory_gb:.0f} GB; "
        f"{machine.system}; commit {machine.commit}\n"
        f"{settings.model.stem}, {first.num_scenes} scenes, {settings.typist.name} typist, seed "
        f"{settings.seed}, {waiting}\n{settings.command}".rstrip()
    )
    table = Table(title="What a person feels, and what it costs", title_justify="left")
    table.add_column("", no_wrap=True)
    for figure in figures:
        table.add_column(figure.client, justify="right", no_wrap=True)
    for label, values in _rows(figures):
        table.add_row(label, *values)
    console.print(table)
    for line in _ratios(figures):
        console.print(line)
    for line in _doubts(figures):
        console.print(f"[yellow]{line}")


def _rows(figures: Sequence[ClientFigures]) -> list[tuple[str, list[str]]]:
    def row(label: str, values: Sequence[float | None], digits: int = 0) -> tuple[str, list[str]]:
        return label, ["-" if value is None else f"{value:.{digits}f}" for value in values]

    return [
        row("keystroke to new ghost text, p50 ms", [f.ghost_percentile(50) for f in figures]),
        row("  p95 ms", [f.ghost_percentile(95) for f in figures]),
        row("  p99 ms", [f.ghost_percentile(99) for f in figures]),
        row("keystrokes with ghost text in time, %", [f.percent_covered for f in figures]),
        row("type-through kept, %", [f.percent_type_through for f in figures]),
        row("keystrokes saved, %", [f.percent_saved for f in figures], 1),
        (
            "shown / accepted / wrong",
            [f"{f.num_shown}/{f.num_accepted}/{f.num_wrong}" for f in figures],
        ),
        ("requests / closed early", [f"{f.num_requests}/{f.num_cancelled}" for f in figures]),
        row("new prompt tokens an answer, median", [f.median_new_prompt for f in figures]),
        row("new prompt tokens a keystroke, mean", [f.new_prompt_per_key for f in figures], 1),
        row("tokens decoded an answer, median", [f.median_decoded for f in figures]),
        row("decoded tokens", [f.num_decoded for f in figures]),
        row("  never shown, %", [f.percent_decode_wasted for f in figures]),
        row("cancel to idle, ms", [f.cancel_to_idle_ms for f in figures]),
        row("CPU s, server", [f.server_cpu_s for f in figures], 1),
        row("CPU s, client", [f.client_cpu_s for f in figures], 1),
        row("time lived, s", [f.wall_s for f in figures]),
    ]


def best_peer(figures: Sequence[ClientFigures]) -> ClientFigures | None:
    """The peer with the lowest median; None without peers that showed anything."""
    peers = [f for f in figures if f.client.startswith(PEERS) and f.ghost_ms]
    return min(peers, key=lambda f: f.ghost_percentile(50) or 0.0, default=None)


def _ratios(figures: Sequence[ClientFigures]) -> list[str]:
    peer = best_peer(figures)
    lines = []
    for ours in figures:
        if peer is None or not ours.client.startswith(OURS) or not ours.ghost_ms:
            continue
        parts = []
        for percent in (50, 95):
            mine, other = ours.ghost_percentile(percent), peer.ghost_percentile(percent)
            if mine and other:
                parts.append(f"p{percent} {other / mine:.1f} x faster")
        saved = ours.percent_saved - peer.percent_saved
        lines.append(
            f"{ours.client} beside {peer.client}: {', '.join(parts)}; {saved:+.1f} points of "
            f"keystrokes saved"
        )
    return lines


def _doubts(figures: Sequence[ClientFigures]) -> list[str]:
    """What a reader must know before believing the table."""
    least = min(len(figure.ghost_ms) for figure in figures)
    if least < 100:
        return [
            (
                f"The percentiles rest on as few as {least} suggestions, of those keystrokes alone "
                f"that ghost text followed in time: read them with the line below them."
            )
        ]
    return []


def replay_json(
    machine: Machine, figures: Sequence[ClientFigures], settings: ReplaySettings
) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "machine": machine.as_dict(),
        "settings": asdict(settings)
        | {
            "model": settings.model.name,
            "options": {
                "context": settings.options.context,
                "threads": settings.options.threads,
                "albor_chooses_threads": settings.options.albor_chooses_threads,
            },
        },
        "clients": [asdict(figure) for figure in figures],
    }


def plot_replay(path: Path, figures: Sequence[ClientFigures]) -> None:
    """The share of keystrokes that had ghost text after so many ms, and keystrokes saved.

    Raises:
        ConfigError: matplotlib is missing or does not know the file's ending.
    """
    pyplot = load_pyplot()
    figure, (curves, bars) = pyplot.subplots(
        1, 2, figsize=(11, 4), gridspec_kw={"width_ratios": [2, 1]}
    )
    for client in figures:
        times = sorted(client.ghost_ms)
        kept = client.num_with_ghost - len(times)
        shares = [100 * (kept + at + 1) / max(client.num_keys, 1) for at in range(len(times))]
        start = 100 * kept / max(client.num_keys, 1)
        curves.step(
            [0, *times, 1000],
            [start, *shares, shares[-1] if shares else start],
            where="post",
            label=client.client,
        )
    curves.set_xlim(0, 1000)
    curves.set_xlabel("ms after the keystroke")
    curves.set_ylabel("keystrokes with ghost text, %")
    curves.legend(fontsize=8)
    names = [client.client for client in figures]
    colours = ["#2a7f62" if name.startswith(OURS) else "#9aa5ab" for name in names]
    bars.barh(names, [client.percent_saved for client in figures], color=colours)
    bars.invert_yaxis()
    bars.set_xlabel("keystrokes saved, %")
    bars.tick_params(axis="y", labelsize=8)
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)
