"""Several models behind one server: which are loaded, who uses them, and which has to go.

One worker thread loads and unloads, so that these never overlap and never run on the event loop;
requests for models that are loaded take a lease and go straight on. A model is unloaded only when
nobody holds a lease on it: to make room for another one (the least recently used goes first) or
after idleness.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from albor_serve.api.completion import ServedModel
from albor_serve.engine import EngineStats
from albor_serve.errors import (
    AlborError,
    ConfigError,
    EngineClosedError,
    ModelLoadError,
    QueueTimeoutError,
    UnknownModelError,
)

__all__ = [
    "LEASES_KEY",
    "Leases",
    "ModelFacts",
    "ModelRegistry",
    "ModelSource",
    "ModelState",
    "ModelView",
    "RegistryLimits",
    "single_model",
]

logger = logging.getLogger(__name__)

LEASES_KEY = "albor.leases"
"""Where a request's scope keeps the leases that end with it."""
DEFAULT_NAMES = (None, "", "default")

ModelState = Literal["unloaded", "loading", "loaded", "unloading", "failed"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be loaded, under the names that clients use."""

    name: str
    load: Callable[[], ServedModel]
    """Loads it and starts its engine; runs on the registry's thread, raises AlborError."""
    aliases: tuple[str, ...] = ()
    needed_bytes: Callable[[], int] | None = None
    """Memory that a load will take; None where it can't be told before."""


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """How much may be in memory."""

    max_loaded: int | None = None
    """Models at once; None sets no limit."""
    max_memory_bytes: int | None = None
    """Weights and KV caches of all loaded models; None sets no limit."""
    idle_unload_s: float | None = None
    """Unload a model that nobody has used for so long; None keeps it."""
    drain_s: float = 60.0
    """How long a load waits for the requests of the model that has to make room."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model once it has been loaded."""

    description: str
    max_seq_len: int
    vocab_size: int
    fim: str | None
    """The family of its fill-in-the-middle prompts; None where it has none."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model at one moment."""

    name: str
    aliases: tuple[str, ...]
    created: int
    """Unix time at which the server learnt of it."""
    state: ModelState
    served: ServedModel | None
    """The model while it is loaded; unless a lease is held it may go at any time."""
    facts: ModelFacts | None
    """What was found when it was last loaded; None before the first time."""
    stats: EngineStats | None
    """Of the running engine, or the last ones of the engine before."""
    num_loads: int
    failure: str | None
    """Why the last load failed."""


@dataclass(slots=True, eq=False)
class _Entry:
    source: ModelSource
    state: ModelState = "unloaded"
    served: ServedModel | None = None
    facts: ModelFacts | None = None
    num_bytes: int = 0
    num_leases: int = 0
    last_used_s: float = 0.0
    num_loads: int = 0
    failure: str | None = None
    last_stats: EngineStats | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    pending: Future[None] | None = None
    """The load that is queued or runs."""


class Leases:
    """ASGI middleware: what a request leased is given back when its answer has been sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a stack of leases in the scope."""
        with ExitStack() as leases:
            scope[LEASES_KEY] = leases
            await self._app(scope, receive, send)


class ModelRegistry:
    """The models of a server. All methods may be called from any thread unless they say so."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        limits: RegistryLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The first source is the default model. Nothing is loaded yet.

        Raises:
            ConfigError: no source, two models of one name, or a limit out of range.
        """
        self._limits = limits or RegistryLimits()
        _check(sources, self._limits)
        self._clock = clock
        self._entries = [_Entry(source) for source in sources]
        self._by_name = {
            name: entry
            for entry in self._entries
            for name in (entry.source.name, *entry.source.aliases)
        }
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_closed = False
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="albor-models")
        self._janitor: threading.Thread | None = None

    @property
    def default_name(self) -> str:
        """Name of the model that answers requests without one."""
        return self._entries[0].source.name

    def names(self) -> list[str]:
        """All names that requests may use, default first."""
        return list(self._by_name)

    def source(self, name: str | None) -> ModelSource:
        """Where the model of that name comes from. Raises UnknownModelError."""
        return self._find(name).source

    def adopt(self, served: ServedModel) -> None:
        """Take a model that is loaded already, under the name of its source."""
        with self._lock:
            entry = self._by_name[served.name]
            self._settle(entry, served)
        self._start_janitor()

    def view(self, name: str | None) -> ModelView:
        """One model; nothing is loaded for it. Raises UnknownModelError."""
        with self._lock:
            return self._view(self._find(name))

    def views(self) -> list[ModelView]:
        """All models in the order of their sources."""
        with self._lock:
            return [self._view(entry) for entry in self._entries]

    async def acquire(
        self, name: str | None, leases: ExitStack, *, is_use: bool = True
    ) -> ServedModel:
        """The model of that name, loaded if need be; it stays until `leases` is closed.

        Without `is_use` this does not count against its idleness.

        Raises:
            UnknownModelError: no model has that name. QueueTimeoutError: models in use left no
                room for it. ModelLoadError: its load failed. EngineClosedError: too late.
        """
        while True:
            with self._lock:
                entry = self._find(name)
                if entry.state == "loaded":
                    assert entry.served is not None
                    self._lease(entry, leases, is_use)
                    return entry.served
                if self._is_closed:
                    raise _closing()
                if entry.pending is None:
                    if entry.state in ("unloaded", "failed"):
                        entry.state = "loading"
                    entry.pending = self._worker.submit(self._load, entry)
                pending = entry.pending
            try:
                # A client that goes away must not cancel what others wait for.
                await asyncio.shield(asyncio.wrap_future(pending))
            except asyncio.CancelledError:
                if pending.cancelled():
                    raise _closing() from None
                raise

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, give running ones so many seconds, cancel the rest, unload.

        Harmless when called again; a call with less patience ends an earlier one.
        """
        with self._changed:
            self._is_closed = True
            loaded = [entry.served for entry in self._entries if entry.served is not None]
            self._changed.notify_all()
        self._worker.shutdown(wait=False, cancel_futures=True)
        closers = [
            threading.Thread(target=served.engine.close, kwargs={"drain_s": drain_s})
            for served in loaded
        ]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()

    # ---- under the lock --------------------------------------------------------------------

    def _find(self, name: str | None) -> _Entry:
        if name in DEFAULT_NAMES:
            return self._entries[0]
        entry = self._by_name.get(name or "")
        if entry is None:
            known = [entry.source.name for entry in self._entries]
            listed = ", ".join(known[:16]) + (", …" if len(known) > 16 else "")
            raise UnknownModelError(
                f"no such model here: this server has {listed} (GET /v1/models lists all names)",
                param="model",
            )
        return entry

    def _lease(self, entry: _Entry, leases: ExitStack, is_use: bool) -> None:
        entry.num_leases += 1
        if is_use:
            entry.last_used_s = self._clock()
        leases.callback(self._release, entry, is_use)

    def _settle(self, entry: _Entry, served: ServedModel) -> None:
        engine = served.engine
        info = engine.backend.info
        num_tokens = len(engine.stats().slots) * engine.max_seq_len
        entry.num_bytes = info.weight_bytes + info.kv_bytes_per_token * num_tokens
        entry.served = served
        entry.facts = ModelFacts(
            served.description,
            engine.max_seq_len,
            engine.tokenizer.vocab_size,
            served.template.family if served.template else None,
        )
        entry.state = "loaded"
        entry.failure = None
        entry.num_loads += 1
        entry.last_used_s = self._clock()
        self._changed.notify_all()

    def _view(self, entry: _Entry) -> ModelView:
        served = entry.served
        return ModelView(
            name=entry.source.name,
            aliases=entry.source.aliases,
            created=entry.created,
            state=entry.state,
            served=served,
            facts=entry.facts,
            stats=entry.last_stats if served is None else served.engine.stats(),
            num_loads=entry.num_loads,
            failure=entry.failure,
        )

    def _victim(self, keep: _Entry) -> _Entry | None:
        """Who goes first: nobody's, then the least recently used."""
        others = [e for e in self._entries if e.state == "loaded" and e is not keep]
        return min(others, key=lambda e: (e.num_leases > 0, e.last_used_s), default=None)

    def _has_room(self, needed: int) -> bool:
        held = [entry for entry in self._entries if entry.served is not None]
        limits = self._limits
        if limits.max_loaded is not None and len(held) >= limits.max_loaded:
            return False
        budget = limits.max_memory_bytes
        return budget is None or sum(entry.num_bytes for entry in held) + needed <= budget

    # ---- other threads ---------------------------------------------------------------------

    def _release(self, entry: _Entry, is_use: bool) -> None:
        with self._changed:
            entry.num_leases -= 1
            if is_use:
                entry.last_used_s = self._clock()
            self._changed.notify_all()

    def _load(self, entry: _Entry) -> None:
        """On the worker: make room, load, report. Never poisons the other models."""
        with self._changed:
            if entry.state == "loaded":  # it was to go, but its requests did not end in time
                entry.pending = None
                return
            entry.state = "loading"
        state: ModelState = "failed"
        reason: AlborError = ModelLoadError(
            f"the model {entry.source.name} could not be loaded: the server's log says why"
        )
        served: ServedModel | None = None
        try:
            self._make_room(entry)
            served = entry.source.load()
        except (QueueTimeoutError, EngineClosedError) as error:
            state, reason = "unloaded", error
        except AlborError as error:
            logger.error("model %s did not load: %s", entry.source.name, error)
        except BaseException:
            if not self._is_closed:
                logger.exception("model %s did not load", entry.source.name)
        with self._changed:
            entry.pending = None
            is_closed = self._is_closed
            if served is None:
                entry.state = state
                entry.failure = str(reason) if state == "failed" else None
            elif not is_closed:
                self._settle(entry, served)
            self._changed.notify_all()
        if is_closed:
            if served is not None:
                served.engine.close()
            raise _closing()
        if served is None:
            raise reason
        logger.info("model %s is loaded", entry.source.name)

    def _make_room(self, entry: _Entry) -> None:
        size_of = entry.source.needed_bytes
        budget = self._limits.max_memory_bytes
        needed = 0 if size_of is None or budget is None else size_of()
        if budget is not None and needed > budget:
            raise ConfigError(
                f"the model needs about {needed / 1e6:.0f} MB, but --max-memory allows "
                f"{budget / 1e6:.0f} MB for all: raise it or take a smaller model"
            )
        while True:
            with self._lock:
                if self._has_room(needed):
                    return
                victim = self._victim(entry)
                if victim is None:
                    return
                # From here on its new requests wait until it is loaded again.
                victim.state = "unloading"
            self._drain(victim)
            self._unload(victim)

    def _drain(self, victim: _Entry) -> None:
        with self._changed:
            drained = self._changed.wait_for(
                lambda: victim.num_leases == 0 or self._is_closed, self._limits.drain_s
            )
            if self._is_closed:
                victim.state = "loaded"  # `close` ends its requests, in its own time
                raise _closing()
            if not drained:
                victim.state = "loaded"
                raise QueueTimeoutError(
                    f"every loaded model has been busy for {self._limits.drain_s:g} s: try again "
                    f"later or start the server with a larger --max-loaded"
                )

    def _unload(self, entry: _Entry) -> None:
        """On the worker, once nobody holds a lease: free the weights and the cache."""
        with self._lock:
            served = entry.served
            entry.last_stats = None if served is None else _at_rest(served.engine.stats())
        if served is not None:
            served.engine.close()
        with self._changed:
            entry.served = None
            entry.num_bytes = 0
            entry.state = "unloaded" if entry.pending is None else "loading"
            self._changed.notify_all()
        del served
        _give_memory_back()
        logger.info("model %s is unloaded", entry.source.name)

    # ---- idleness --------------------------------------------------------------------------

    def _start_janitor(self) -> None:
        if self._limits.idle_unload_s is None or self._janitor is not None:
            return
        self._janitor = threading.Thread(target=self._watch, name="albor-idle", daemon=True)
        self._janitor.start()

    def _watch(self) -> None:
        limit = self._limits.idle_unload_s
        assert limit is not None
        while True:
            with self._changed:
                if self._is_closed:
                    return
                now = self._clock()
                due = [
                    (entry.last_used_s + limit, entry)
                    for entry in self._entries
                    if entry.state == "loaded" and not entry.num_leases
                ]
                idle = [entry for at, entry in due if at <= now]
                if not idle:
                    self._changed.wait(min((at - now for at, _ in due), default=None))
                    continue
            # On the worker, beside no load.
            with contextlib.suppress(RuntimeError, CancelledError):  # closed meanwhile
                self._worker.submit(self._unload_idle, idle).result()

    def _unload_idle(self, entries: Iterable[_Entry]) -> None:
        limit = self._limits.idle_unload_s
        assert limit is not None
        for entry in entries:
            with self._lock:
                is_idle = entry.last_used_s + limit <= self._clock()
                if entry.state != "loaded" or entry.num_leases or not is_idle:
                    continue
                if entry.served is not None and entry.served.engine.stats().num_running:
                    entry.last_used_s = self._clock()  # a warm-up that nobody waits for
                    continue
                entry.state = "unloading"
            self._unload(entry)


def _closing() -> EngineClosedError:
    return EngineClosedError("the server is shutting down: try again later")


def _at_rest(stats: EngineStats) -> EngineStats:
    """The counters of an engine that is gone."""
    return replace(stats, num_running=0, num_waiting=0, slots=(), failure=None, error=None)


def single_model(served: ServedModel) -> ModelRegistry:
    """A registry of one model that is loaded already and stays."""
    registry = ModelRegistry([ModelSource(served.name, lambda: served, served.aliases)])
    registry.adopt(served)
    return registry


def _check(sources: Sequence[ModelSource], limits: RegistryLimits) -> None:
    if not sources:
        raise ConfigError("there is no model to serve: name one")
    seen: set[str] = set()
    for source in sources:
        for name in (source.name, *source.aliases):
            if name in seen or name in DEFAULT_NAMES:
                raise ConfigError(
                    f"the model name {name!r} is given twice or reserved: give each model its own "
                    f"name, as in MODEL=NAME"
                )
            seen.add(name)
    if limits.max_loaded is not None and limits.max_loaded < 1:
        raise ConfigError(f"--max-loaded is {limits.max_loaded}: it must be at least 1")
    if limits.max_memory_bytes is not None and limits.max_memory_bytes < 1:
        raise ConfigError("--max-memory must be more than 0")
    if limits.idle_unload_s is not None and not 0 < limits.idle_unload_s < float("inf"):
        raise ConfigError(f"--idle-unload is {limits.idle_unload_s:g}: it must be more than 0 s")


def _give_memory_back() -> None:
    """Freed memory goes back to the system; the C library would keep it for later."""
    gc.collect()
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
