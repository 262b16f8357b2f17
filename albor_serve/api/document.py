"""The OpenAPI document: every route says what it takes and what it answers.

Bodies are checked by the dialects themselves, not by FastAPI, whose errors repeat the input. So
each route describes itself here, and the parts come together when the document is asked for.
"""

from __future__ import annotations

import ast
import inspect
import pydoc
import textwrap
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from albor_serve.api.schemas import with_inner

__all__ = ["Usage", "add_document", "route"]

REF = "#/components/schemas/{model}"

_EVENT = {
    "description": "One event: data is a part of the answer as JSON, an error, or [DONE].",
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
"""A stream's schema tells of each of its events, as OpenAPI 3.2's itemSchema does."""


class PromptTokensDetails(BaseModel):
    """More about the prompt's tokens."""

    cached_tokens: int
    """Prompt tokens found in the KV cache."""


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None
    num_prompt_tokens: int | None = None
    """Where the prompt did not fit: its length."""
    max_seq_len: int | None = None
    """Where the prompt did not fit: the tokens that the context holds."""


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail


_STATUSES = {
    400: "The request is at fault; the message says how.",
    401: "The server has API keys and this is none of them.",
    403: "Sent by a page or for a name that is not this machine's.",
    404: "There is no such model or URL.",
    408: "The body did not arrive in time.",
    409: "A newer request of the same session took its place.",
    413: "The body is too large.",
    500: "The device or the native library failed.",
    503: "Loading, shutting down, too busy, or the GPU failed: the code says which.",
}


def route(
    router: APIRouter | FastAPI,
    method: str,
    path: str,
    handler: Callable[..., Awaitable[Response | str]],
    *,
    summary: str,
    body: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    media_type: str = "application/json",
    streams: bool = False,
    query: Mapping[str, str] | None = None,
    statuses: Sequence[int] = (),
) -> None:
    """Add a route with its description.

    Args:
        router: takes the route.
        method: "GET" or "POST".
        path: its URL.
        handler: answers it.
        summary: one line about it.
        body: schema of the request's body, if it takes one.
        answer: schema of the 200 answer; None for text of `media_type`.
        media_type: of the 200 answer.
        streams: whether `stream: true` answers with server-sent events instead.
        query: the URL's parameters and what they mean.
        statuses: error statuses; by default all that a completion may have.
    """
    ok: dict[str, Any] = {"schema": {"type": "string"} if answer is None else _ref(answer)}
    content = {media_type: ok}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    if not statuses:
        statuses = tuple(_STATUSES) if body is not None else (401, 403, 500, 503)
        if query is not None and "model" in query:
            statuses = (401, 403, 404, 500, 503)
    error = {"application/json": {"schema": _ref(ErrorBody)}}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    for status in statuses:
        responses[str(status)] = {"description": _STATUSES[status], "content": error}
    models = [f"{m.__module__}.{m.__qualname__}" for m in (ErrorBody, body, answer) if m]
    extra: dict[str, Any] = {"responses": responses, _MODELS: models}
    if query is not None:
        extra["parameters"] = [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
            for name, text in query.items()
        ]
    if body is not None:
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(body)}},
        }
    router.add_api_route(
        path,
        handler,
        methods=[method],
        summary=summary,
        response_class=Response,
        openapi_extra=extra,
    )


def add_document(app: FastAPI) -> None:
    """Make the application's OpenAPI document complete; call it once all routes are there."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it


_MODELS = "x-albor-models"
"""Where a route keeps the names of the models that its description refers to: their schemas take
tens of milliseconds, so they are made when the document is asked for and not at every start."""


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    names: set[str] = set()
    for path in document["paths"].values():
        for operation in path.values():
            names.update(operation.pop(_MODELS, ()))
            # FastAPI's own checks, which no route uses.
            operation["responses"].pop("422", None)
    models: list[Any] = [pydoc.locate(name) for name in sorted(names)]
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    parts = schemas.get("$defs", {})
    for model in with_inner(models):
        for name, text in _field_docs(model).items():
            parts[model.__name__]["properties"][name].setdefault("description", text)
    document["components"] = {"schemas": dict(sorted(parts.items()))}
    return document


def _field_docs(model: type[BaseModel]) -> dict[str, str]:
    """What the source says below each field. Pydantic could read it too, but at each start."""
    docs: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not issubclass(kind, BaseModel) or kind.__module__.startswith("pydantic."):
            continue
        if "[" in kind.__name__:  # a generic with its types filled in: nobody wrote it
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for pair in pairwise(tree.body):
            match pair:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
    return docs


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}
