"""One replay: clients, each with a server of its own, through the same scenes.

One after the other, or scene by scene in random order, so that what else the machine does meanwhile
falls on all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from albor_serve.bench.peers import PeerOptions
from albor_serve.bench.replay.clients.base import Client
from albor_serve.bench.replay.clients.http import post_json
from albor_serve.bench.replay.clients.llama_vim import LlamaVimClient
from albor_serve.bench.replay.clients.lsp import LspClient
from albor_serve.bench.replay.clients.plain import (
    ALBOR,
    DEBOUNCE_S,
    LLAMA_SERVER,
    Dialect,
    PlainClient,
)
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.measure import ClientFigures, figures_of
from albor_serve.bench.replay.scenes import Scene
from albor_serve.bench.replay.servers import open_server, read_totals
from albor_serve.bench.replay.typist import Typist
from albor_serve.bench.replay.user import Person, SceneTrace

__all__ = [
    "CLIENTS",
    "OURS",
    "ReplaySettings",
    "replay_client",
    "replay_clients",
    "replay_scenes",
]

NUM_CANCELS: Final = 5
CANCEL_AFTER_S: Final = 0.05
SETTLE_S: Final = 0.5
"""Between scenes of different clients: until one's unseen work has ended."""

Show = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a client is made of."""

    name: str
    address: str
    """Host and port of its server."""
    clock: Clock
    lsp_command: tuple[str, ...]
    lsp_settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ClientKind:
    """How to make a client, and what serves it."""

    server: str
    dialect: Dialect
    make: Callable[[Setup], Client]
    is_real_time: bool = False
    """Never skip idle time: the client may work unseen."""
    arguments: tuple[str, ...] = ()
    """Of albor-serve."""
    about: str = ""


def _plain(
    dialect: Dialect, debounce_s: float = DEBOUNCE_S, session: str | None = None
) -> Callable[[Setup], Client]:
    return lambda setup: PlainClient(
        setup.name, setup.address, dialect, setup.clock, debounce_s, session
    )


def _lsp(setup: Setup) -> Client:
    return LspClient(setup.name, setup.address, setup.clock, setup.lsp_command, setup.lsp_settings)


OURS: Final = "albor"
"""The client that variants of settings are made of."""

CLIENTS: Final = {
    OURS: ClientKind("albor", ALBOR, _lsp, is_real_time=True),
    "albor-eager": ClientKind("albor", ALBOR, _plain(ALBOR, 0.0, "replay")),
    "albor-eager-nodrafts": ClientKind(
        "albor", ALBOR, _plain(ALBOR, 0.0, "replay"), arguments=("--no-speculation",)
    ),
    "albor-plain": ClientKind("albor", ALBOR, _plain(ALBOR)),
    "llama-vim": ClientKind(
        "llama-server",
        LLAMA_SERVER,
        lambda setup: LlamaVimClient(setup.name, setup.address, setup.clock),
    ),
    "llama-plain": ClientKind("llama-server", LLAMA_SERVER, _plain(LLAMA_SERVER)),
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
    lsp_command: tuple[str, ...] = ("albor-lsp",)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of the language server for clients that are variants of ours, by name."""
    command: str = ""


def replay_client(
    name: str, scenes: Sequence[Scene], settings: ReplaySettings, show: Show
) -> ClientFigures:
    """Start the server, replay all scenes, stop it."""
    return replay_clients([name], scenes, settings, show)[0]


def replay_clients(
    names: Sequence[str], scenes: Sequence[Scene], settings: ReplaySettings, show: Show
) -> list[ClientFigures]:
    """Start all clients and their servers, replay each scene with each of them, stop them."""
    with contextlib.ExitStack() as servers:
        running = []
        for name in names:
            kind = CLIENTS[OURS if name in settings.variants else name]
            served = servers.enter_context(
                open_server(kind.server, settings.model, settings.options, kind.arguments)
            )
            clock = Clock(skip_idle=settings.skip_idle and not kind.is_real_time)
            setup = Setup(
                name, served.address, clock, settings.lsp_command, settings.variants.get(name, {})
            )
            client = kind.make(setup)
            running.append(_Running(client, kind, served.address, clock, served.peer.cpu_seconds))
        return asyncio.run(_replay(running, scenes, settings, show))


@dataclass(slots=True)
class _Running:
    """A client and what is counted for it."""

    client: Client
    kind: ClientKind
    address: str
    clock: Clock
    cpu_seconds: Callable[[], float]
    """Of its server, so far."""
    traces: list[SceneTrace] = field(default_factory=list)


async def _replay(
    running: Sequence[_Running], scenes: Sequence[Scene], settings: ReplaySettings, show: Show
) -> list[ClientFigures]:
    async with contextlib.AsyncExitStack() as clients:
        for one in running:
            await one.client.start()
            clients.push_async_callback(one.client.stop)
        before = [await read_totals(one.address) for one in running]
        cpu = [(one.cpu_seconds(), one.client.cpu_seconds()) for one in running]
        order = random.Random(settings.seed)
        for at, scene in enumerate(scenes):
            for one in order.sample(running, len(running)):
                if len(running) > 1:
                    await asyncio.sleep(SETTLE_S)

                def part(text: str, _: float, at: int = at) -> None:
                    show(text, at / len(scenes))

                one.traces += await replay_scenes([scene], one.client, settings, one.clock, part)
        results = []
        for one, totals, (server, client) in zip(running, before, cpu, strict=True):
            after = await read_totals(one.address)
            figures = figures_of(one.client.name, one.traces, one.client.work, totals, after)
            figures.server_cpu_s = one.cpu_seconds() - server
            figures.client_cpu_s = one.client.cpu_seconds() - client
            figures.skipped_s = one.clock.skipped_s
            results.append(figures)
    for one, figures in zip(running, results, strict=True):
        delay = await _cancel_to_idle_ms(one.address, one.kind.dialect, scenes[0])
        figures.cancel_to_idle_ms = delay
    return results


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
