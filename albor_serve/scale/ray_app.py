"""albor as a Ray Serve application: `serve run albor_serve.scale.ray_app:build replicas=2`.

Each replica is an engine with the whole HTTP surface of albor-serve. A request with the header
`X-Session-Id` goes to the replica that holds the session's KV cache; one without goes anywhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from albor_serve.api.app import AppSettings, create_app
from albor_serve.api.completion import ServedModel
from albor_serve.errors import BackendError, ConfigError
from albor_serve.loader import LoadOptions, load_model
from albor_serve.scale.affinity import ranked

__all__ = ["Replica", "ScaleOptions", "SessionRouter", "build"]

REPLICA_HEADER = b"x-albor-replica"
"""On every answer: which replica gave it."""


class ScaleOptions(BaseModel):
    """What `serve run … name=value` may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path | None = None
    """A GGUF file or a Hugging Face folder, there on every machine; None is the embedded model."""
    name: str = Field(default="", max_length=256)
    """Name of the model for clients; empty takes the file's."""
    replicas: Annotated[int, Field(ge=1, le=1024)] = 2
    slots: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests that one replica computes at once; more of them wait in its engine's queue."""
    max_ongoing: Annotated[int, Field(ge=1, le=4096)] = 64
    """Requests that one replica may hold; a session whose replica holds so many goes to its
    second choice."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of each replica; None takes the cores that other programs leave free."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """Cores that Ray sets aside for each replica."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Names that requests may use for this service in Host and Origin; "*" allows any."""


class SessionRouter(RequestRouter):
    """Sends a session to the replica that holds its cache, and elsewhere only if that is full."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The candidates one by one, in the order in which the session prefers them."""
        session = ""
        if pending_request is not None:
            session = pending_request.metadata.session_id
            # While all are full, wait between rounds instead of asking in a tight loop.
            pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in ranked(session or secrets.token_hex(8), by_name)]


@serve.ingress()
class Replica:
    """One engine and its HTTP surface, in a process of its own."""

    def __init__(self, options: ScaleOptions) -> None:
        """Load the model. Raises what `load_model` raises; Ray then reports it and tries again."""
        loaded = load_model(
            options.model, LoadOptions(num_slots=options.slots, num_threads=options.threads)
        )
        self._engine = loaded.engine
        self._engine.start()
        names = dict.fromkeys(name for name in (options.name, loaded.name) if name)
        name, *aliases = names
        served = ServedModel(
            name, self._engine, loaded.template, tuple(aliases), loaded.description
        )
        allowed = None if "*" in options.hosts else options.hosts
        self._app = create_app(served, AppSettings(allowed_hosts=allowed))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray serves."""
        return _Signed(self._app, serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Called by Ray now and then.

        Raises:
            BackendError: the engine has failed; Ray replaces the replica.
        """
        failure = self._engine.stats().failure
        if failure is not None:
            raise BackendError(failure)

    def __del__(self) -> None:
        # Ray calls it once the replica has drained.
        if hasattr(self, "_engine"):
            self._engine.close()


class _Signed:
    """Adds the replica's name to every answer."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._header = (REPLICA_HEADER, name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._app(scope, receive, signed)


def build(arguments: Mapping[str, object] | ScaleOptions) -> serve.Application:
    """The application, for `serve run` (whose values are strings) and `serve.run`.

    Raises:
        ConfigError: an option that does not exist or is out of range.
    """
    options = _options(arguments)
    deployment = serve.deployment(
        Replica,
        name="albor",
        num_replicas=options.replicas,
        max_ongoing_requests=options.max_ongoing,
        ray_actor_options={"num_cpus": options.cpus},
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        request_router_config=RequestRouterConfig(request_router_class=SessionRouter),
    )
    return deployment.bind(options)


def _options(arguments: Mapping[str, object] | ScaleOptions) -> ScaleOptions:
    try:
        return ScaleOptions.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        known = ", ".join(ScaleOptions.model_fields)
        raise ConfigError(
            f"option {name} is {first['input']!r}: {first['msg']}; the options are {known}"
        ) from None
