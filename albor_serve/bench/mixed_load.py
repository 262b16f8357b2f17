"""Many clients at once: what each waits for, what is lost, what stays behind.

Every client repeats the same seeded mix over /infill, which albor-serve and llama-server both
speak: short fill-in-the-middle requests, long prompts, and requests that hang up half-way. The
servers take turns, so that a slow minute of the machine meets them all.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import httpx
import numpy as np

from albor_serve.errors import ConfigError

__all__ = ["FINISHED_KINDS", "LoadTarget", "MixSettings", "Tally", "percentiles", "run_load"]

CODE = (
    "def total_{0}(values):\n    result = {0}\n    for value in values:\n        result += value\n"
)
LONG_COPIES = 30
"""Functions in a long prompt: about 1,000 tokens."""
KINDS = ("fim", "long", "cancel")
WEIGHTS = (0.7, 0.15, 0.15)
FINISHED_KINDS = KINDS[:2]
"""Those that wait for their answer."""
CANCEL_AFTER_S = 0.05
IDLE_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """A server that runs."""

    name: str
    url: str
    pid: int | None = None
    """To read its memory."""


@dataclass(frozen=True, slots=True)
class MixSettings:
    """The load on each server."""

    num_clients: int = 64
    round_s: float = 20.0
    num_rounds: int = 3
    num_new: int = 24
    seed: int = 0


@dataclass(slots=True)
class Tally:
    """What happened at one server; times in ms."""

    first_token_ms: dict[str, list[float]] = field(default_factory=dict)
    """By kind of request."""
    total_ms: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: int = 0
    num_cancelled: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    """Answers that were refused, by status code."""
    num_lost: int = 0
    """Requests that broke off without an end or an error."""
    seconds: float = 0.0
    rss_mib: list[float] = field(default_factory=list)
    """Resident memory before the first round and after each; empty where unknown."""
    num_busy_slots: int | None = None
    """Slots still busy after the load; None where the server doesn't tell."""

    @property
    def num_finished(self) -> int:
        """Answers that came to their end."""
        return sum(len(times) for times in self.total_ms.values())


def percentiles(
    times: Mapping[str, Sequence[float]], kind: str | None = None
) -> tuple[float, float, float]:
    """p50, p95 and p99 of one kind of request, or of all; NaN where nothing was finished."""
    chosen = times.get(kind, ()) if kind is not None else chain(*times.values())
    values = list(chosen)
    if not values:
        return (float("nan"),) * 3
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return float(p50), float(p95), float(p99)


def run_load(targets: Sequence[LoadTarget], settings: MixSettings) -> dict[str, Tally]:
    """Measure `targets` in turns; the result is by name.

    Raises:
        ConfigError: a server can't be reached, or the settings make no load.
    """
    if not targets or settings.num_clients < 1 or settings.num_rounds < 1 or settings.round_s <= 0:
        raise ConfigError("a load needs a server, a client, a round and a time above 0")
    return asyncio.run(_run(targets, settings))


async def _run(targets: Sequence[LoadTarget], settings: MixSettings) -> dict[str, Tally]:
    tallies = {target.name: Tally() for target in targets}
    for target in targets:
        async with httpx.AsyncClient(base_url=target.url) as http:
            try:
                (await http.get("/health", timeout=10)).raise_for_status()
            except httpx.HTTPError as error:
                raise ConfigError(
                    f"{target.name} does not answer /health ({type(error).__name__}): start it"
                ) from error
        _note_memory(target, tallies[target.name])
    for number in range(settings.num_rounds):
        for target in targets if number % 2 == 0 else targets[::-1]:
            await _round(target, tallies[target.name], settings, number)
    return tallies


async def _round(target: LoadTarget, tally: Tally, settings: MixSettings, number: int) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=target.url, timeout=120, limits=limits) as http:
        await asyncio.gather(
            *(
                _client(http, tally, settings, random.Random(f"{settings.seed}/{number}/{client}"))
                for client in range(settings.num_clients)
            )
        )
        tally.seconds += time.perf_counter() - started
        tally.num_busy_slots = await _busy_slots(http)
    _note_memory(target, tally)


async def _client(
    http: httpx.AsyncClient, tally: Tally, settings: MixSettings, rng: random.Random
) -> None:
    end = time.perf_counter() + settings.round_s
    while time.perf_counter() < end:
        await _request(http, tally, settings, rng)


async def _request(
    http: httpx.AsyncClient, tally: Tally, settings: MixSettings, rng: random.Random
) -> None:
    (kind,) = rng.choices(KINDS, WEIGHTS)
    copies = LONG_COPIES if kind == "long" else 2
    body = {
        "input_prefix": "".join(CODE.format(rng.randrange(1000)) for _ in range(copies)),
        "input_suffix": "\n    return result\n",
        "prompt": "    ",
        "n_predict": settings.num_new,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    started = time.perf_counter()
    try:
        if kind == "cancel":
            await asyncio.wait_for(_read(http, body, None, kind, started), CANCEL_AFTER_S)
        else:
            await _read(http, body, tally, kind, started)
    except TimeoutError:
        tally.num_cancelled += 1
    except httpx.HTTPError:
        tally.num_lost += 1


async def _read(
    http: httpx.AsyncClient,
    body: dict[str, object],
    tally: Tally | None,
    kind: str,
    started: float,
) -> None:
    """Read one stream; `tally` None only reads."""
    first: float | None = None
    is_finished = False
    num_tokens = 0
    async with http.stream("POST", "/infill", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            if tally is not None:
                count = tally.statuses.get(response.status_code, 0)
                tally.statuses[response.status_code] = count + 1
            await asyncio.sleep(0.05)  # as a client that is told to come back
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("content") and first is None:
                first = time.perf_counter()
            if event.get("stop"):
                is_finished = True
                num_tokens = int(event.get("tokens_predicted", 0))
    if tally is None:
        return
    if not is_finished:
        tally.num_lost += 1
        return
    now = time.perf_counter()
    tally.first_token_ms.setdefault(kind, []).append(1000 * ((first or now) - started))
    tally.total_ms.setdefault(kind, []).append(1000 * (now - started))
    tally.num_tokens += num_tokens


async def _busy_slots(http: httpx.AsyncClient) -> int | None:
    """Slots that are still busy once there was time to free them."""
    end = time.perf_counter() + IDLE_WAIT_S
    while True:
        answer = await http.get("/slots")
        if answer.status_code != 200:
            return None
        num_busy = sum(bool(slot.get("is_processing")) for slot in answer.json())
        if num_busy == 0 or time.perf_counter() > end:
            return num_busy
        await asyncio.sleep(0.1)


def _note_memory(target: LoadTarget, tally: Tally) -> None:
    if target.pid is None:
        return
    try:
        lines = Path(f"/proc/{target.pid}/status").read_text().splitlines()
    except OSError:
        return
    tally.rss_mib += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")]
