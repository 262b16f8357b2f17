"""Routes: what each URL does, and the rules that hold for all of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from albor_serve import __version__
from albor_serve.api.auth import ApiKeys, KeyCheck, SiteCheck
from albor_serve.api.completion import Completion, CompletionSpec, Job, ServedModel, plan_jobs
from albor_serve.api.dialect import (
    LARGE_BODY_BYTES,
    MakeWriter,
    Writer,
    complete,
    json_response,
)
from albor_serve.api.document import add_document, route
from albor_serve.api.errors import BodyTimeoutError, PayloadTooLargeError, error_response
from albor_serve.api.infill import infill_router
from albor_serve.api.llamacpp_routes import llamacpp_router
from albor_serve.api.metrics import METRICS_MEDIA_TYPE, metrics_text
from albor_serve.api.mistral import mistral_router
from albor_serve.api.openai import (
    CompletionAnswer,
    CompletionWriter,
    ModelEntry,
    ModelList,
    completion_spec,
    model_body,
    models_body,
)
from albor_serve.api.playground import add_playground, page, wants_page
from albor_serve.api.registry import (
    LEASES_KEY,
    Leases,
    ModelRegistry,
    ModelView,
    single_model,
)
from albor_serve.api.request_log import RequestLog
from albor_serve.api.schemas import CompletionBody, parse_completion, parse_json
from albor_serve.config import SamplingParams
from albor_serve.errors import AlborError, BackendError, RequestError
from albor_serve.sequence import GenerateRequest

__all__ = ["AppSettings", "create_app"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AppSettings:
    """Limits of the HTTP surface."""

    max_body_bytes: int = 4 << 20
    keep_alive_s: float = 15.0
    """A comment is sent after so long without a token, so that proxies keep the stream open."""
    health_s: float = 30.0
    """How long a finished completion proves that the server works."""
    health_timeout_s: float = 10.0
    """A completion that takes longer proves the server broken, unless it was busy: the engine has
    got on with other requests meanwhile."""
    body_s: float = 30.0
    """How long a client may take to send its whole body."""
    allowed_hosts: tuple[str, ...] | None = ("localhost", "127.0.0.1", "[::1]")
    """Names a request's Host header may have, so that no web page can reach the server through a
    name of its own (DNS rebinding); None allows any."""
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may use the server, "*" for all; the server's own page always may."""
    api_keys: ApiKeys = field(default_factory=lambda: ApiKeys(()))
    """Keys of which every request but /health must bring one; empty: none is needed."""
    log_prompts: bool = False
    """Whether the log of requests holds their bodies."""
    min_confidence: float = 0.0
    """For fill-in-the-middle requests that do not say: answers end before their first token that
    is less likely than this."""


def create_app(models: ServedModel | ModelRegistry, settings: AppSettings | None = None) -> FastAPI:
    """The ASGI application for one loaded model or a registry of several.

    The caller closes the registry, or starts and closes the engine of the one model.
    """
    registry = single_model(models) if isinstance(models, ServedModel) else models
    return _App(registry, settings or AppSettings()).make()


class Health(BaseModel):
    """The answer of /health."""

    status: Literal["ok"]
    model: str
    """The default model."""
    loaded: list[str]
    """Models in memory; the others are loaded on demand."""
    degraded: str | None = None
    """Only while the CPU answers in place of a GPU (--fallback cpu): why."""


class _App:
    def __init__(self, models: ModelRegistry, settings: AppSettings) -> None:
        self._models = models
        self._settings = settings
        self._last_ok_s = float("-inf")
        self._proof: asyncio.Task[None] | None = None
        self._num_answers: Counter[int] = Counter()

    def make(self) -> FastAPI:
        app = FastAPI(
            title="albor",
            version=__version__,
            summary="Local code completion: OpenAI-compatible, with fill-in-the-middle.",
            docs_url=None,
            redoc_url=None,
        )
        app.add_exception_handler(AlborError, _on_albor_error)
        app.add_exception_handler(HTTPException, _on_http_error)
        app.add_exception_handler(RequestValidationError, _on_validation_error)
        app.add_exception_handler(ClientDisconnect, _on_disconnect)
        app.add_exception_handler(Exception, _on_bug)
        route(
            app,
            "POST",
            "/v1/completions",
            self.completions,
            summary="OpenAI's text completion; with `suffix`, fill-in-the-middle at the cursor.",
            body=CompletionBody,
            answer=CompletionAnswer,
            streams=True,
        )
        for make_router in (infill_router, llamacpp_router, mistral_router):
            app.include_router(make_router(self))
        route(
            app,
            "GET",
            "/v1/models",
            self.models,
            summary="The models that this server answers for.",
            answer=ModelList,
        )
        route(
            app,
            "GET",
            "/v1/models/{name:path}",
            self.model,
            summary="One model.",
            answer=ModelEntry,
            statuses=(401, 403, 404),
        )
        route(
            app,
            "GET",
            "/health",
            self.health,
            summary="200 only if a completion has worked, or got on, just now.",
            answer=Health,
        )
        route(
            app,
            "GET",
            "/metrics",
            self.metrics,
            summary="Counters and histograms for Prometheus.",
            media_type=METRICS_MEDIA_TYPE,
        )
        app.add_api_route("/health", self.health, methods=["HEAD"], include_in_schema=False)
        route(app, "GET", "/", self.home, summary="What this is.", media_type="text/plain")
        add_document(app)
        add_playground(app)
        # The last one added is the outermost: ids and the log see every answer.
        app.add_middleware(Leases)
        app.add_middleware(KeyCheck, keys=self._settings.api_keys)
        app.add_middleware(
            SiteCheck,
            allowed_hosts=self._settings.allowed_hosts,
            cors_origins=self._settings.cors_origins,
        )
        app.add_middleware(
            RequestLog, num_answers=self._num_answers, log_prompts=self._settings.log_prompts
        )
        return app

    async def completions(self, request: Request) -> Response:
        """OpenAI's text completion; with `suffix`, fill-in-the-middle at the cursor."""
        return await complete(
            self,
            request,
            parse_completion,
            lambda _served, body: completion_spec(body),
            CompletionWriter,
        )

    # ---- what every dialect needs (dialect.Host) --------------------------------------------

    async def read_json(self, request: Request) -> tuple[Any, int]:
        """(the parsed body, its size in bytes); see `Host`."""
        try:
            async with asyncio.timeout(self._settings.body_s):
                data = await _read_body(request, self._settings.max_body_bytes)
        except TimeoutError:
            raise BodyTimeoutError(
                f"the body did not arrive within {self._settings.body_s:g} s: send it faster"
            ) from None
        return parse_json(data), len(data)

    async def find_model(self, request: Request, name: str | None) -> ServedModel:
        """The model that answers to a name, loaded; see `Host`."""
        return await self._models.acquire(name, request.scope[LEASES_KEY])

    def view_model(self, name: str | None) -> ModelView:
        """The model that answers to a name, as it is now; see `Host`."""
        return self._models.view(name)

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
        """Plan, run and write a completion; see `Host`."""
        least, options = self._settings.min_confidence, spec.options
        is_unsaid = "min_confidence" not in options.model_fields_set
        if least and spec.fim_suffix is not None and is_unsaid:
            changes = {"min_confidence": least}
            spec = replace(spec, options=options.model_copy(update=changes))
        if num_bytes > LARGE_BODY_BYTES:
            jobs = await asyncio.to_thread(plan_jobs, served, spec)
        else:
            jobs = plan_jobs(served, spec)
        completion = Completion(served.engine, jobs)
        writer = make_writer(completion)
        if stream:
            return _SseResponse(completion, writer, self._settings.keep_alive_s, self._worked)
        await _unless_disconnected(request, completion, self._worked)
        return json_response(writer.whole())

    async def models(self) -> Response:
        """The models that this server answers for."""
        return json_response(models_body(self._models.views()))

    async def model(self, name: str) -> Response:
        """One model."""
        view = self._models.view(name)
        return json_response(model_body(view, name if name != "default" else view.name))

    async def metrics(self) -> Response:
        """Counters and histograms for Prometheus."""
        views = self._models.views()
        stats = {view.name: view.stats for view in views if view.stats is not None}
        loads = {view.name: (view.served is not None, view.num_loads) for view in views}
        return Response(
            metrics_text(stats, self._num_answers, loads), media_type=METRICS_MEDIA_TYPE
        )

    async def health(self) -> Response:
        """200 only if a completion has worked, or got on, just now.

        A model that sleeps is not woken for it.
        """
        views = self._models.views()
        for view in views:
            if view.served is not None and view.stats is not None and view.stats.error:
                return error_response(view.stats.error, 503)
        loaded = [view.name for view in views if view.state == "loaded"]
        if not loaded and views[0].failure is not None:
            return error_response(BackendError(views[0].failure), 503)
        if loaded and time.monotonic() - self._last_ok_s > self._settings.health_s:
            # One proof for all who ask meanwhile, so that they can't fill a stuck engine's queue.
            if self._proof is None or self._proof.done():
                self._proof = asyncio.create_task(self._prove(loaded[0]))
            try:
                await asyncio.shield(self._proof)
            except AlborError as error:
                return error_response(error, 503)
        body = {"status": "ok", "model": self._models.default_name, "loaded": loaded}
        stats = [view.stats for view in views if view.served is not None]
        degraded = [one.degraded for one in stats if one is not None and one.degraded]
        if degraded:
            body["degraded"] = degraded[0]
        return json_response(body)

    async def home(self, request: Request) -> Response:
        """The playground for a browser; what this is, in two lines, for everyone else."""
        if wants_page(request):
            return page()
        return PlainTextResponse(
            f"albor {__version__} serves {self._models.default_name}\n"
            f"{'   '.join(_urls(request.app))}\n"
        )

    async def _prove(self, name: str) -> None:
        """Complete one token, or see others' prompts and answers get on, or raise."""
        with ExitStack() as leases:
            engine = (await self._models.acquire(name, leases, is_use=False)).engine
            num_steps = engine.stats().num_steps
            tokens = engine.tokenizer.encode("\n") or [0]
            jobs = [_probe(tokens)]
            completion = Completion(engine, jobs)
            try:
                async with asyncio.timeout(self._settings.health_timeout_s):
                    await completion.wait()
            except TimeoutError:
                if engine.stats().num_steps > num_steps:
                    self._worked()
                    return
                raise BackendError(
                    f"no completion within {self._settings.health_timeout_s:g} s: the server is "
                    f"overloaded or stuck"
                ) from None
            self._worked()

    def _worked(self) -> None:
        self._last_ok_s = time.monotonic()


def _probe(tokens: Sequence[int]) -> Job:
    return Job(GenerateRequest(tuple(tokens), 1, SamplingParams(temperature=0.0)), 0)


class _SseResponse(Response):
    """A streamed answer: its headers wait for the first event, so that an early failure still
    gets its real status; it stops the engine as soon as the client is gone."""

    def __init__(
        self,
        completion: Completion,
        stream: Writer,
        keep_alive_s: float,
        on_progress: Callable[[], None],
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        # The length is not known; Response has set it for an empty body.
        del self.headers["content-length"]
        self._completion = completion
        self._stream = stream
        self._keep_alive_s = keep_alive_s
        self._on_progress = on_progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_wait_for_disconnect(receive, self._completion))
        try:
            await self._send_all(scope, receive, send)
        finally:
            watcher.cancel()
            self._completion.cancel()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def write(*chunks: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": 200,
                        "headers": self.raw_headers,
                    }
                )
                chunks = (*self._stream.first(), *chunks)
            await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": True})

        try:
            async for updates in self._completion.updates(self._keep_alive_s):
                if updates:
                    self._on_progress()
                    await write(*(c for update in updates for c in self._stream.update(update)))
                else:
                    await write(b": still working\n\n")
            await write(*self._stream.last())
        except AlborError as error:
            if not started:
                await error_response(error)(scope, receive, send)
                return
            await write(*self._stream.failed(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read_body(request: Request, limit: int) -> bytes:
    """The whole body, refused as soon as it is known to be too long."""
    too_large = PayloadTooLargeError(
        f"the body is larger than {limit} bytes: send less text", code="payload_too_large"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def _wait_for_disconnect(receive: Receive, completion: Completion) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    completion.cancel()


async def _unless_disconnected(
    request: Request, completion: Completion, on_progress: Callable[[], None]
) -> None:
    """Run a completion to its end; a client that goes away cancels it."""
    watcher = asyncio.create_task(_wait_for_disconnect(request.receive, completion))
    try:
        async for _ in completion.updates():
            on_progress()
    finally:
        watcher.cancel()


def _urls(app: FastAPI) -> list[str]:
    """What there is to ask for: each route that is described, with its method."""
    paths = app.openapi()["paths"]
    urls = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    return [*urls, f"GET {app.openapi_url}"]


async def _on_albor_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, AlborError)
    return error_response(error)


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "no such URL: GET / lists them", 405: "this URL does not take that method"}
    message = known.get(error.status_code, "the request could not be read")
    response = error_response(RequestError(message), error.status_code)
    response.headers.update(error.headers or {})  # Allow, for 405
    return response


async def _on_validation_error(_request: Request, _error: Exception) -> Response:
    return error_response(RequestError("the request could not be read"), 400)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return error_response(RequestError("the client went away"), 400)  # nobody reads it


async def _on_bug(_request: Request, _error: Exception) -> Response:
    return error_response(BackendError("an internal error; the server's log has the details"), 500)
