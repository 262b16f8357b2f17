"""What a dialect of the HTTP surface needs of the server, and the server of a dialect.

A dialect checks its own body, turns it into a `CompletionSpec` and names a `Writer` for the
answer. Reading bodies, finding models, running completions, streaming, cancelling when the client
goes away and reporting errors are the host's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from albor_serve.api.completion import Completion, CompletionSpec, ServedModel, Update
from albor_serve.api.registry import ModelView
from albor_serve.errors import AlborError

__all__ = [
    "LARGE_BODY_BYTES",
    "Asked",
    "Host",
    "MakeWriter",
    "Writer",
    "complete",
    "encode_json",
    "json_response",
]


LARGE_BODY_BYTES = 8 * 1024
"""Tokenizing more than this takes over 5 ms on a slow core, so it runs beside the event loop."""


class Writer(Protocol):
    """How one dialect writes one answer."""

    def whole(self) -> Any:
        """The JSON value of the finished answer."""

    def first(self) -> Iterator[bytes]:
        """Streamed: what can be sent before the first token."""

    def update(self, update: Update) -> Iterator[bytes]:
        """Streamed: events for what is new."""

    def last(self) -> Iterator[bytes]:
        """Streamed: events after the last update."""

    def failed(self, error: AlborError) -> Iterator[bytes]:
        """Streamed: events for an error after the headers were sent."""


MakeWriter = Callable[[Completion], Writer]


class Host(Protocol):
    """The server, as a dialect sees it."""

    async def read_json(self, request: Request) -> tuple[Any, int]:
        """(the parsed body, its size in bytes).

        Raises:
            RequestError: it is not JSON, or larger than allowed.
        """

    async def find_model(self, request: Request, name: str | None) -> ServedModel:
        """The model that answers to a name, loaded; it stays until `request` is answered.

        Raises:
            UnknownModelError: there is none. AlborError: it could not be loaded.
        """

    def view_model(self, name: str | None) -> ModelView:
        """The model that answers to a name, as it is now: nothing is loaded.

        Raises:
            UnknownModelError: there is none.
        """

    async def answer(
        self,
        request: Request,
        served: ServedModel,
        spec: CompletionSpec,
        make_writer: MakeWriter,
        *,
        stream: bool,
        num_bytes: int,
    ) -> Response:
        """Plan, run and write a completion; `num_bytes` is the size of the request's body.

        Raises:
            AlborError: it failed before anything was sent.
        """


class Asked(Protocol):
    """What every dialect's body of a completion has."""

    @property
    def model(self) -> str | None:
        """Which model is to answer."""

    @property
    def stream(self) -> bool | None:
        """Whether the answer comes as server-sent events."""


BodyT = TypeVar("BodyT", bound=Asked)


async def complete(
    host: Host,
    request: Request,
    parse: Callable[[Any], BodyT],
    plan: Callable[[ServedModel, BodyT], CompletionSpec],
    write: Callable[[ServedModel, BodyT, Completion], Writer],
) -> Response:
    """Answer one completion of a dialect that knows how to parse, plan and write it.

    Raises:
        AlborError: it failed before anything was sent.
    """
    value, num_bytes = await host.read_json(request)
    body = parse(value)
    served = await host.find_model(request, body.model)
    is_large = num_bytes > LARGE_BODY_BYTES  # a plan may tokenize
    spec = await asyncio.to_thread(plan, served, body) if is_large else plan(served, body)
    return await host.answer(
        request,
        served,
        spec,
        lambda completion: write(served, body, completion),
        stream=bool(body.stream),
        num_bytes=num_bytes,
    )


def encode_json(value: Any) -> bytes:
    """Compact JSON on one line: llama.vim looks for `"content":"` in the raw text."""
    return json.dumps(value, separators=(",", ":")).encode()


def json_response(value: Any) -> Response:
    """A 200 answer."""
    return Response(encode_json(value), media_type="application/json")
