"""One replay: each client in turn, with a server of its own, through the same scenes."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from albor_serve.bench.peers import PeerOptions
from albor_serve.bench.replay.clients.base import Client
from albor_serve.bench.replay.clients.http import post_json
from albor_serve.bench.replay.clients.llama_vim import LlamaVimClient
from albor_serve.bench.replay.clients.plain import ALBOR, LLAMA_SERVER, Dialect, PlainClient
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.measure import ClientFigures, figures_of
from albor_serve.bench.replay.scenes import Scene
from albor_serve.bench.replay.servers import open_server, read_totals
from albor_serve.bench.replay.typist import Typist
from albor_serve.bench.replay.user import Person, SceneTrace

__all__ = ["CLIENTS", "ReplaySettings", "replay_client", "replay_scenes"]

NUM_CANCELS: Final = 5
CANCEL_AFTER_S: Final = 0.05

Show = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class ClientKind:
    """How to make a client, and what serves it."""

    server: str
    dialect: Dialect
    make: Callable[[str, str, Clock], Client]
    """From name, address and clock."""
    arguments: tuple[str, ...] = ()
    """Of albor-serve."""
    about: str = ""


CLIENTS: Final = {
    "llama-vim": ClientKind(
        "llama-server",
        LLAMA_SERVER,
        LlamaVimClient,
        about="llama-server /infill with llama.vim's algorithm",
    ),
    "llama-plain": ClientKind(
        "llama-server",
        LLAMA_SERVER,
        lambda name, address, clock: PlainClient(name, address, LLAMA_SERVER, clock),
        about="llama-server behind a plain client, 350 ms debounce",
    ),
    "albor-plain": ClientKind(
        "albor",
        ALBOR,
        lambda name, address, clock: PlainClient(name, address, ALBOR, clock),
        about="albor-serve behind the same plain client",
    ),
    "albor-eager": ClientKind(
        "albor",
        ALBOR,
        lambda name, address, clock: PlainClient(name, address, ALBOR, clock, 0.0, "replay"),
        about="albor-serve asked at each key, newest request first",
    ),
}
"""What can be replayed, by name."""


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """What to replay and how."""

    model: Path
    options: PeerOptions
    typist: Typist
    seed: int = 0
    skip_idle: bool = True
    command: str = ""


def replay_client(
    name: str, scenes: Sequence[Scene], settings: ReplaySettings, show: Show
) -> ClientFigures:
    """Start the server, replay all scenes, stop it."""
    kind = CLIENTS[name]
    with open_server(kind.server, settings.model, settings.options, kind.arguments) as served:
        return asyncio.run(
            _replay(name, kind, served.address, served.peer.cpu_seconds, scenes, settings, show)
        )


async def _replay(
    name: str,
    kind: ClientKind,
    address: str,
    cpu_seconds: Callable[[], float],
    scenes: Sequence[Scene],
    settings: ReplaySettings,
    show: Show,
) -> ClientFigures:
    clock = Clock(skip_idle=settings.skip_idle)
    client = kind.make(name, address, clock)
    await client.start()
    try:
        before, server_cpu, own_cpu = await read_totals(address), cpu_seconds(), time.process_time()
        traces = await replay_scenes(scenes, client, settings, clock, show)
        figures = figures_of(name, traces, client.work, before, await read_totals(address))
        figures.server_cpu_s = cpu_seconds() - server_cpu
        figures.client_cpu_s = time.process_time() - own_cpu
        figures.skipped_s = clock.skipped_s
    finally:
        await client.stop()
    figures.cancel_to_idle_ms = await _cancel_to_idle_ms(address, kind.dialect, scenes[0])
    return figures


async def replay_scenes(
    scenes: Sequence[Scene],
    client: Client,
    settings: ReplaySettings,
    clock: Clock,
    show: Show,
) -> list[SceneTrace]:
    """One person writes all scenes with a client that is running."""
    traces = []
    async with clock:
        for at, scene in enumerate(scenes):
            show(f"{client.name}: {scene.name}", at / len(scenes))
            person = Person(scene, client, settings.typist, clock, settings.seed)
            traces.append(await person.write())
    return traces


async def _cancel_to_idle_ms(address: str, dialect: Dialect, scene: Scene) -> float:
    """How much later a tiny request is answered right after a long one was closed: median.

    The long one is closed while it prefills, when stopping is hardest.
    """

    async def tiny() -> float:
        started = time.perf_counter()
        await post_json(address, dialect.path, dialect.body("x = ", "", []) | _ONE_TOKEN)
        return (time.perf_counter() - started) * 1000

    await tiny()
    idle = statistics.median([await tiny() for _ in range(NUM_CANCELS)])
    delays = []
    for attempt in range(NUM_CANCELS):
        # Different text each time, so that nothing of it is cached.
        text = f"# {attempt}\n" + scene.source.text[:4000]
        body = dialect.body(text, "", [])
        long = asyncio.create_task(post_json(address, dialect.path, body))
        await asyncio.sleep(CANCEL_AFTER_S)
        long.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await long
        delays.append(await tiny() - idle)
    return max(0.0, statistics.median(delays))


_ONE_TOKEN: Final = {"max_tokens": 1, "n_predict": 1}
